"""``hpcpipe schedule``: look at a schedule, prove it, or run it against a clock."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcpipe.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from hpcpipe.schedule.action import Schedule
    from hpcpipe.schedule.bubble import BubbleParts
    from hpcpipe.schedule.simulate import Timeline

_SOURCE_HELP = "name of a schedule, such as 1f1b, or a file that ends in .csv, ours or PyTorch's"
_COSTS_HELP = (
    "what one microbatch through all layers of one rank takes forward, for the gradients of the inputs, and for those"
    " of the weights (default 1,1,1)"
)
_MAX_STASH_HELP = (
    "the most that a rank may stash, in activations of one microbatch through all layers of one rank: greedy plans"
    " within it, and other schedules are held to it (default: as many as there are ranks for greedy, no limit else)"
)
_MAX_IN_FLIGHT_HELP = "the most messages that a rank may have sent and nobody taken up, on a clock where F = I = W"
_RULES = (
    "every action stands once, on the rank of its stage",
    "every stage runs every microbatch forward, then backward once, as B or as I and W",
    "weight gradients accumulate in ascending microbatch order",
    "every message has one sender and one receiver, is computed before and posted in time",
    "no deadlock, even if every send blocks until its receive is posted",
    "gradients are reduced after the last of them, and weights updated after everything else",
)


# What causes the bubble, as `split_bubble` splits it.
_PARTS = ("schedule", "imbalance", "messages")


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the verb and its three actions to the parser of ``hpcpipe``.

    Parameters
    ----------
    subparsers
        What ``ArgumentParser.add_subparsers`` returned.
    """
    verb = subparsers.add_parser(
        "schedule",
        help="show, check or simulate schedules",
        description="Look at a schedule, prove it, or run it against a clock.",
    )
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")

    shown = actions.add_parser(
        "show",
        help="a picture: one row per rank, time to the right",
        description="Draw a schedule, each action as its microbatch: in colour on a terminal, with letters elsewhere.",
    )
    _add_source(shown, "print one JSON object, with the list of every rank")
    _add_svg(shown)
    shown.add_argument("--actions", action="store_true", help="print the list of every rank too")
    shown.set_defaults(run=run_show)

    checked = actions.add_parser(
        "check",
        help="prove that it is complete, in order, and free of deadlock",
        description="Prove a schedule, or say which rank breaks which rule. Exit code 64 when a rule is broken.",
    )
    _add_source(
        checked,
        "print one JSON object, keys ok, problems, rules and others; only schedule, ok and problems when it is refused",
    )
    checked.add_argument("--max-in-flight", type=int, metavar="N", help=_MAX_IN_FLIGHT_HELP)
    checked.set_defaults(run=run_check)

    simulated = actions.add_parser(
        "simulate",
        help="makespan, bubble, memory and messages",
        description="Run a schedule against a clock. A stash is counted in activations of one microbatch through all"
        " layers of one rank.",
    )
    _add_source(simulated, "print one JSON object, keys makespan, bubble, bubble_parts, peak_stash and others")
    _add_svg(simulated)
    simulated.set_defaults(run=run_simulate)


def run_show(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe schedule show``.

    Parameters
    ----------
    args : argparse.Namespace
        The options of all three actions, ``svg`` and ``actions``.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    UsageError
        There is no such schedule or file, it breaks a rule, or a number is wrong.
    """
    from hpcpipe.cli.picture import print_picture, rank_label

    program, timeline = _simulated(args)
    listed = _listed(program, args.messages)
    if args.json:
        lists = [[str(action) for action in actions] for actions in listed.actions]
        print(json.dumps({**_facts(program), "stage_to_rank": list(program.stage_to_rank), "actions": lists}, indent=2))
        return ExitCode.DONE
    print(_headline(program))
    print_picture(program, timeline)
    print(_figures(timeline))
    if args.actions:
        print()
        for rank, actions in enumerate(listed.actions):
            print(f"{rank_label(program, rank)}{' '.join(map(str, actions))}")
    return ExitCode.DONE


def run_check(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe schedule check``; parameters and errors as in `run_show`.

    Returns
    -------
    int
        Exit code 0; 64 where ``json`` says that the schedule is refused.
    """
    if args.max_in_flight is not None and args.max_in_flight < 0:
        raise UsageError(f"--max-in-flight {args.max_in_flight}: give a number of messages, 0 or more")
    times, text = _times(args), _text(args)
    try:
        program = _make(args, times, text)
        if args.max_in_flight is not None:
            from hpcpipe.schedule.check import check

            check(program, max_in_flight=args.max_in_flight)
    except UsageError as error:
        if not args.json:
            raise
        print(json.dumps({"schedule": args.source, "ok": False, "problems": [str(error)]}, indent=2))
        return ExitCode.USAGE
    _write_csv(args, program)
    rules = [*_RULES]
    if args.max_stash is not None:
        rules.append(f"no rank stashes more than {args.max_stash:g} activations")
    if args.max_in_flight is not None:
        rules.append(f"no rank has more than {args.max_in_flight} messages in flight where F = I = W")
    if args.json:
        print(json.dumps({**_facts(program), "ok": True, "problems": [], "rules": rules}, indent=2))
    else:
        facts = _facts(program)
        counts = f"{facts['num_actions']:,} actions, {facts['num_messages']:,} messages"
        print("\n".join([f"{_headline(program)}: ok, {counts}", *(f"  holds: {rule}" for rule in rules)]))
    return ExitCode.DONE


def run_simulate(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe schedule simulate``; parameters and errors as in `run_show`.

    Returns
    -------
    int
        Exit code 0.
    """
    from hpcpipe.schedule.bubble import split_bubble
    from hpcpipe.schedule.simulate import Costs

    program, timeline = _simulated(args)
    parts = split_bubble(program, Costs.uniform(program, *_times(args)))
    if args.json:
        found = {
            **_facts(program),
            "makespan": timeline.makespan,
            "bubble": timeline.bubble,
            "bubble_fraction": timeline.bubble / timeline.makespan,
            "peak_stash": timeline.peak_stash,
            "max_in_flight": timeline.max_in_flight,
            "busy": list(timeline.busy),
            "fill_and_drain": timeline.fill_and_drain,
            "waiting": timeline.waiting,
            "bubble_parts": dict(zip(_PARTS, parts.whole, strict=True)),
            "bubble_parts_per_rank": {name: list(getattr(parts, name)) for name in _PARTS},
        }
        print(json.dumps(found, indent=2))
        return ExitCode.DONE
    _print_idle_time(program, timeline, parts)
    return ExitCode.DONE


def _print_idle_time(program: "Schedule", timeline: "Timeline", parts: "BubbleParts") -> None:
    """Print where and why ranks are idle: the bubble by cause, and a table with one row per rank."""
    from hpcpipe.cli.picture import rank_label

    def shown(part: float) -> str:
        # A difference of two makespans has their rounding error.
        return f"{part if abs(part) > 1e-9 * timeline.makespan else 0:.4g}"

    causes = ", ".join(f"{name} {shown(part)}" for name, part in zip(_PARTS, parts.whole, strict=True))
    print(f"{_headline(program)}\n{_figures(timeline)}\nbubble by cause: {causes}\n")
    heads = f"{'busy':>10}{'fill, drain':>14}{'waiting':>10}{'stash':>9}"
    print(f"{'':<{len(rank_label(program, 0))}}{heads}   {''.join(f'{name:>11}' for name in _PARTS)}")
    columns = (timeline.busy, timeline.fill_and_drain, timeline.waiting, timeline.peak_stash)
    for rank, (busy, outside, waiting, stash) in enumerate(zip(*columns, strict=True)):
        by_cause = "".join(f"{shown(getattr(parts, name)[rank]):>11}" for name in _PARTS)
        row = f"{busy:>10.6g}{outside:>14.6g}{waiting:>10.4g}{stash:>9.4g}   {by_cause}"
        print(f"{rank_label(program, rank)}{row}")


def _add_source(parser: argparse.ArgumentParser, json_help: str) -> None:
    """Add what every action takes."""
    parser.add_argument("source", metavar="NAME_OR_CSV", help=_SOURCE_HELP)
    parser.add_argument("--ranks", type=int, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, metavar="M", help="microbatches of one step")
    parser.add_argument("--chunks", type=int, metavar="V", help="stages per rank, where the schedule leaves a choice")
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the schedule to a file")
    parser.add_argument(
        "--messages", action="store_true", help="with messages and updates in what --csv or show writes"
    )
    parser.add_argument("--costs", default="1,1,1", metavar="F,I,W", help=_COSTS_HELP)
    parser.add_argument("--message", type=float, default=0.0, metavar="T", help="what a message takes (default 0)")
    parser.add_argument("--max-stash", type=float, metavar="A", help=_MAX_STASH_HELP)


def _add_svg(parser: argparse.ArgumentParser) -> None:
    """Add what draws into a file."""
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the schedule into a file")


def _load(args: argparse.Namespace) -> "Schedule":
    """Make the schedule, with messages, prove it, and write it where --csv says."""
    program = _make(args, _times(args), _text(args))
    _write_csv(args, program)
    return program


def _text(args: argparse.Namespace) -> str | None:
    """Read the file of a schedule; None for a name, which needs its numbers."""
    if args.source.endswith(".csv"):
        return _read(Path(args.source))

    from hpcpipe.schedule.build import GENERATORS

    missing = [f"--{key}" for key in ("ranks", "microbatches") if getattr(args, key) is None]
    if missing and args.source in GENERATORS:
        raise UsageError(f"the schedule {args.source} needs {' and '.join(missing)}; only a .csv file has its own")
    return None


def _make(args: argparse.Namespace, times: tuple[float, float, float, float], text: str | None) -> "Schedule":
    """Make the schedule, from the text of its file if it has one, and prove it."""
    from hpcpipe.schedule.build import build
    from hpcpipe.schedule.check import check
    from hpcpipe.schedule.csv_file import build_from_csv
    from hpcpipe.schedule.simulate import Costs

    if text is not None:
        program = build_from_csv(text, args.source)
        _require_agreement(args, program)
        if args.max_stash is not None:
            check(program, [args.max_stash] * program.num_ranks)
        return program
    ranks, microbatches, chunks = args.ranks or 0, args.microbatches or 0, args.chunks or 0
    planned = args.source == "greedy" and ranks > 0 and chunks >= 0
    costs = Costs.even(ranks, ranks * (chunks or 2), *times) if planned else None
    max_stash = None if args.max_stash is None else [args.max_stash] * ranks
    return build(args.source, ranks, microbatches, chunks, costs, max_stash)


def _write_csv(args: argparse.Namespace, program: "Schedule") -> None:
    """Write the schedule where --csv says."""
    if args.csv is None:
        return
    from hpcpipe.schedule.csv_file import write_csv

    _write(args.csv, write_csv(_listed(program, args.messages)))


def _simulated(args: argparse.Namespace) -> "tuple[Schedule, Timeline]":
    """Make the schedule, run it against the clock, and draw it where --svg says."""
    program = _load(args)

    from hpcpipe.schedule.simulate import Costs, simulate
    from hpcpipe.schedule.svg import to_svg

    timeline = simulate(program, Costs.uniform(program, *_times(args)))
    if args.svg is not None:
        _write(args.svg, to_svg(program, timeline))
    return program, timeline


def _times(args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Read what F, I, W and a message take."""
    try:
        costs = [float(word) for word in args.costs.split(",")]
    except ValueError:
        costs = []
    if len(costs) != 3 or not all(0 <= cost < math.inf for cost in costs) or costs[0] == 0:
        raise UsageError(f"--costs {args.costs}: give three times, 0 or more and the first above 0, such as 1,1.2,0.8")
    if not 0 <= args.message < math.inf:
        raise UsageError(f"--message {args.message}: give the time that a message takes, 0 or more")
    if args.max_stash is not None and not args.max_stash > 0:
        raise UsageError(f"--max-stash {args.max_stash:g}: give a number of activations above 0")
    return costs[0], costs[1], costs[2], args.message


def _require_agreement(args: argparse.Namespace, program: "Schedule") -> None:
    """Refuse numbers on the command line that are not those of the file."""
    chunks = max(len(program.stages_of(rank)) for rank in range(program.num_ranks))
    found = {"ranks": program.num_ranks, "microbatches": program.num_microbatches, "chunks": chunks}
    for key, number in found.items():
        given = getattr(args, key)
        if given not in (None, number):
            raise UsageError(f"--{key} {given}, but {args.source} has {number}: leave the option out for a .csv file")


def _listed(program: "Schedule", with_messages: bool) -> "Schedule":
    from hpcpipe.schedule.lower import without_messages

    return program if with_messages else without_messages(program)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file: byte {error.start} is not UTF-8") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _facts(program: "Schedule") -> dict[str, Any]:
    """Return what every object of --json starts with."""
    from hpcpipe.schedule.action import COMPUTE, Kind

    kinds = [action.kind for actions in program.actions for action in actions]
    return {
        "schedule": program.name,
        "ranks": program.num_ranks,
        "stages": program.num_stages,
        "microbatches": program.num_microbatches,
        "num_actions": sum(kind in COMPUTE for kind in kinds),
        "num_messages": sum(kind in (Kind.SEND_F, Kind.SEND_B) for kind in kinds),
    }


def _headline(program: "Schedule") -> str:
    counts = {"rank": program.num_ranks, "stage": program.num_stages, "microbatch": program.num_microbatches}
    words = [
        f"{number} {word}{('es' if word.endswith('h') else 's') * (number > 1)}" for word, number in counts.items()
    ]
    return f"{program.name}: {', '.join(words)}"


def _figures(timeline: "Timeline") -> str:
    share = 100 * timeline.bubble / timeline.makespan
    return (
        f"makespan {timeline.makespan:.6g}, bubble {timeline.bubble:.4g} ({share:.1f} %),"
        f" stash at most {max(timeline.peak_stash):.4g}, messages in flight at most {timeline.max_in_flight}"
    )
