"""``hpcpipe batch``: the decisions of ``slurm/train.sbatch``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hpcpipe.cli import train
from hpcpipe.cli.parser import Parser
from hpcpipe.cluster import batch, slurm
from hpcpipe.cluster.batch import Attempts, Verdict
from hpcpipe.errors import ExitCode, StoppedError, UsageError
from hpcpipe.telemetry.status import newest_checkpoint, read_status

_DESCRIPTION = """\
Decide for slurm/train.sbatch; of use only in a Slurm job.

begin prints the words of the hpcpipe command that starts the ranks, each with a NUL after it; end prints what the
script does next (end, relaunch, requeue) and the exit code of the job should that be to end."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command's parser."""
    parser = subparsers.add_parser("batch", help="decide for slurm/train.sbatch", description=_DESCRIPTION)
    parser.add_argument("moment", choices=("begin", "end"), help="before or after an attempt")
    parser.add_argument("--job", required=True, help="number of the job, or of array and task")
    parser.add_argument("--ranks", type=int, required=True, help="ranks that the job was submitted for")
    parser.add_argument("--cpus", type=int, default=1, help="processors of each rank")
    parser.add_argument("--spare-nodes", type=int, default=0, help="nodes left idle until another is lost")
    parser.add_argument("--spares", type=int, default=0, help="how many of the ranks stand by")
    parser.add_argument("--recovery", choices=("on", "off", ""), default="", help="of hpcpipe launch")
    parser.add_argument("--max-idle", type=int, default=3, help="attempts in a row without a newer checkpoint")
    parser.add_argument("--code", type=int, default=0, help="exit code of hpcpipe launch")
    parser.add_argument("--warned", action="store_true", help="Slurm has told the job that it will end")
    parser.add_argument("--mpirun-arg", dest="mpirun_args", metavar="X", action="append", default=[])
    parser.add_argument("config", metavar="CONFIG", help="of hpcpipe train")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its other arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out the verb.

    Parameters
    ----------
    args : argparse.Namespace
        See `add_parser`.

    Returns
    -------
    int
        0.

    Raises
    ------
    HpcpipeError
        See `begin` and `end`.
    """
    args.arguments = [args.config, *args.arguments]
    sys.stdout.write(begin(args) if args.moment == "begin" else end(args))
    return int(ExitCode.DONE)


def begin(args: argparse.Namespace) -> str:
    """Prepare an attempt.

    Parameters
    ----------
    args : argparse.Namespace
        See `run`.

    Returns
    -------
    str
        Words of ``hpcpipe``, each with a NUL after it.

    Raises
    ------
    StoppedError
        The attempts before were killed without progress, as often as allowed.
    DiskError
        The job's file in the run directory could not be written.
    UsageError
        The arguments of ``train`` are wrong.
    """
    allocation = _allocation()
    directory = _run_directory(args.arguments)
    path, step = _file(directory, args.job), newest_checkpoint(directory)
    before = Attempts.read(path)
    start = f"{allocation.job_id}.{allocation.restart_count}"
    attempts = (before or Attempts(idle=allocation.restart_count)).begin(step, start)
    if attempts.idle >= args.max_idle:
        raise StoppedError(_give_up(attempts, args.max_idle))
    places = _places(args, allocation, attempts.lost)
    if not places:
        raise UsageError(f"no number of ranks fits on what is left of {allocation.node_list}")
    # Wrong arguments must not leave a directory behind: `launch` will refuse them.
    num_ranks = sum(places.values()) - args.spares
    if directory.is_dir() or is_valid(args.arguments, num_ranks):
        attempts.write(path)
    if before is None and allocation.restart_count == 0:
        again = []
    else:
        again = ["--resume", "auto"]
        _say(f"goes on from step {step}; attempts in a row without a newer checkpoint: {attempts.idle}")
    words = ["launch", "-n", str(num_ranks)]
    words += [f"--mpirun-arg={arg}" for arg in [*args.mpirun_args, *_hosts(places, args, attempts.lost)]]
    return "".join(f"{word}\0" for word in [*words, *_recovery(args), "train", *args.arguments, *again])


def end(args: argparse.Namespace) -> str:
    """Decide what follows an attempt.

    Parameters
    ----------
    args : argparse.Namespace
        See `run`.

    Returns
    -------
    str
        A `Verdict` and the exit code of the job.

    Raises
    ------
    DiskError
        The job's file in the run directory could not be written.
    """
    allocation = _allocation()
    directory = _run_directory(args.arguments)
    path, step = _file(directory, args.job), newest_checkpoint(directory)
    attempts = (Attempts.read(path) or Attempts(idle=allocation.restart_count)).after(step)
    status = _status(directory, allocation)
    is_halted = args.code == ExitCode.STOPPED and status.get("stopped_by") == "halt"
    verdict, code = batch.decide(args.code, attempts, args.max_idle, args.warned, is_halted)
    if verdict is Verdict.END and code in (ExitCode.STOPPED, ExitCode.RANK_FAILED) and not is_halted:
        _say(_give_up(attempts, args.max_idle))
    if verdict is Verdict.RELAUNCH:
        names = batch.current_nodes(args.job, allocation.node_list)
        left = batch.answering(names) if len(names) > 1 else names
        lost = [name for name in batch.host_names(allocation.node_list) if name not in left]
        attempts = replace(attempts, lost=tuple(lost))
        if lost:
            _say(f"no answer from {', '.join(lost)}")
        if not _places(args, allocation, lost):
            _say(f"no number of ranks fits on the {len(left)} nodes that are left")
            verdict = Verdict.REQUEUE
    if verdict is not Verdict.END or path.exists():
        attempts.write(path)
    cause = str(status.get("cause") or "").partition(";")[0]
    _say(f"the ranks have ended with code {code}{cause and f' ({cause})'}; checkpoint of step {step}: {_NEXT[verdict]}")
    return f"{verdict} {code}\n"


_NEXT = {
    Verdict.END: "the job ends",
    Verdict.RELAUNCH: "they start again in this allocation",
    Verdict.REQUEUE: "the job is to go back into the queue",
}


def is_valid(arguments: Sequence[str], num_ranks: int) -> bool:
    """Tell whether a run can have so many ranks.

    Parameters
    ----------
    arguments : sequence of str
        Of ``hpcpipe train``.
    num_ranks : int
        Ranks.
    """
    from hpcpipe.cli.preflight import check_ranks

    try:
        check_ranks(_parse_train(arguments), num_ranks)
    except UsageError:
        return False
    return True


def _allocation() -> slurm.Allocation:
    allocation = slurm.allocation()
    if allocation is None:
        raise UsageError("not in a Slurm job")
    return allocation


def _parse_train(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="hpcpipe")
    verbs: argparse._SubParsersAction[Any] = parser.add_subparsers()
    train.add_parser(verbs)
    return parser.parse_args(["train", *arguments])


def _run_directory(arguments: Sequence[str]) -> Path:
    from hpcpipe.config.load import load, run_directory

    parsed = _parse_train(arguments)
    directory = run_directory(parsed.config, parsed.overrides)
    if directory is None:
        load(parsed.config, parsed.overrides)
        raise UsageError(f"{parsed.config}: it does not say where the run directory is")
    return directory


def _file(directory: Path, job: str) -> Path:
    return directory / f"job-{job}.json"


def _places(args: argparse.Namespace, allocation: slurm.Allocation, lost: Sequence[str]) -> dict[str, int]:
    """Lay the ranks on the nodes that are left, those that stand by included."""
    nodes = batch.host_names(allocation.node_list)
    per_node = allocation.num_tasks_per_node or -(-args.ranks // max(allocation.num_nodes, 1))
    wanted = args.ranks
    if args.spare_nodes:
        wanted = min(wanted, per_node * (allocation.num_nodes - args.spare_nodes))
        if wanted < 1:
            raise UsageError(
                f"{args.spare_nodes} spare of {allocation.num_nodes} nodes leave none to train on: ask for more --nodes"
            )
    room = max((allocation.num_cpus_per_node or 0) // max(args.cpus, 1), per_node)
    left = [name for name in nodes if name not in lost]
    if not left:
        return {}
    return batch.choose_ranks(left, wanted, per_node, room, partial(_are_enough, args.arguments, args.spares))


def _are_enough(arguments: Sequence[str], num_spares: int, num_processes: int) -> bool:
    """Tell whether a run can have so many processes of which some stand by."""
    return num_processes > num_spares and is_valid(arguments, num_processes - num_spares)


def _hosts(places: dict[str, int], args: argparse.Namespace, lost: Sequence[str]) -> list[str]:
    """Name the nodes to mpirun where they are not simply those of the job."""
    if not lost and not args.spare_nodes:
        return []
    return ["--host", ",".join(f"{name}:{count}" for name, count in places.items())]


def _recovery(args: argparse.Namespace) -> list[str]:
    """Return the options of ``launch`` about ranks that fail."""
    spares = ["--spares", str(args.spares)] if args.spares else []
    return [*spares, *(["--recovery", args.recovery] if args.recovery else [])]


def _status(directory: Path, allocation: slurm.Allocation) -> dict[str, Any]:
    """Return what the run says about itself, if it was written since this start of the job."""
    status = read_status(directory)
    here = {"id": allocation.job_id, "restart_count": allocation.restart_count}
    return status if status.get("job") == here else {}


def _give_up(attempts: Attempts, max_idle: int) -> str:
    return (
        f"{attempts.idle} attempts in a row have left no newer checkpoint than that of step {attempts.step}, and"
        f" HPCPIPE_MAX_IDLE_RESTARTS is {max_idle}: the job ends; give it more time, or write checkpoints more often"
    )


def _say(text: str) -> None:
    print(f"train.sbatch: {text}", file=sys.stderr, flush=True)
