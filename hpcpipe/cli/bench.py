"""``hpcpipe bench``: measure parts of hpcpipe on this machine."""

import argparse
import json
from typing import Any

from hpcpipe.errors import ExitCode

_SCHEDULES = ("1f1b", "zb-h1", "interleaved", "zb-v")
_WIDEST = 400
_ACTIONS = """\
Measure what the executor itself costs per action: it walks real schedules on stages that compute nothing. Alone,
one process walks the lists of all ranks, without messages; under `hpcpipe launch -n N bench actions` every rank
walks its own, with real messages, and what it waits for them is left out."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the verb and its benchmarks to the command's parser."""
    verb = subparsers.add_parser("bench", help="measure parts of hpcpipe on this machine", description=__doc__)
    benchmarks = verb.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    actions = benchmarks.add_parser("actions", help="what the executor costs per action", description=_ACTIONS)
    actions.add_argument(
        "--schedule",
        action="append",
        dest="schedules",
        metavar="NAME",
        help=f"a schedule; may be given several times (default {', '.join(_SCHEDULES)})",
    )
    actions.add_argument("--ranks", type=int, metavar="P", help="ranks of the pipeline (default: those started, or 4)")
    actions.add_argument("--microbatches", type=int, default=32, metavar="M", help="of a step (default 32)")
    actions.add_argument("--repetitions", type=int, default=30, metavar="R", help="walks of each list (default 30)")
    actions.add_argument("--json", action="store_true", help="print one JSON object")
    actions.set_defaults(run=run_actions)


def run_actions(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe bench actions``; every rank runs this.

    Parameters
    ----------
    args : argparse.Namespace
        ``schedules``, ``ranks``, ``microbatches``, ``repetitions``, ``json``.

    Returns
    -------
    int
        Exit code 0, or that of an error which all ranks met.

    Raises
    ------
    UsageError
        There is no such schedule for these numbers, or not as many ranks were started.
    """
    from hpcpipe.cluster.environment import limit_blas_threads

    limit_blas_threads()
    from hpcpipe.train.bench import bench_actions

    result = bench_actions(args.schedules or _SCHEDULES, args.ranks, args.microbatches, args.repetitions)
    if result.report is not None and args.json:
        print(json.dumps(result.report, indent=1))
    elif result.report is not None:
        _print_table(result.report)
    return int(result.code or ExitCode.DONE)


def _print_table(report: dict[str, Any]) -> None:
    """Print a row per schedule, a column per kind of action."""
    from rich.console import Console
    from rich.table import Table

    from hpcpipe.cluster.environment import terminal_size

    messages = "with MPI messages" if report["transport"] == "mpi" else "without messages"
    print(
        f"executor, microseconds per action, compute and waiting left out: {report['ranks']} ranks,"
        f" {report['microbatches']} microbatches, {messages}, median of {report['repetitions']} walks"
    )
    kinds = list(dict.fromkeys(kind for row in report["schedules"] for kind in row["kinds"]))
    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("schedule", "actions", "us", "10-90 %", *kinds):
        table.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
    for row in report["schedules"]:
        figures = [f"{row['kinds'][kind]:.1f}" if kind in row["kinds"] else "" for kind in kinds]
        spread = f"{row['p10_us']:.1f}-{row['p90_us']:.1f}"
        table.add_row(row["schedule"], str(row["actions"]), f"{row['action_us']:.1f}", spread, *figures)
    size = terminal_size()
    console = Console(highlight=False, width=size[0] if size else None)
    # Columns that do not fit are worth more on a second line than cut off.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=_WIDEST)).maximum)
    console.print(table, soft_wrap=True)
