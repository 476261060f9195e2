"""``hpcpipe launch``: start the ranks with mpirun, watch over them, and return the run's true exit code."""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hpcpipe
from hpcpipe.cli.parser import nearest
from hpcpipe.cli.preflight import check_start
from hpcpipe.errors import BY_CODE, DiskError, ExitCode, HpcpipeError, RankError, StoppedError, UsageError

if TYPE_CHECKING:
    from hpcpipe.cluster.supervise import Outcome, Progress

MPI_VERBS = ("train", "bench")

_MPIRUN_REFUSED = 213
_MOST_NAMED = 3
_TOLD = re.compile(rb"hpcpipe: (?:error|stopped): |Traceback")
_DESCRIPTION = """\
Start N ranks of a verb with Open MPI's mpirun and the options that this machine needs.

Ctrl-C, SIGTERM or SIGUSR1 ask the run to write a checkpoint and stop (exit code 75); a third Ctrl-C, or
SIGQUIT, kills every rank at once. The exit code is the one in the run's status.json, which is right also
where mpirun's is not."""


@dataclass(frozen=True)
class Status:
    """What ``status.json`` says about this launch."""

    state: str
    exit_code: int | None
    cause: str = ""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command's parser."""
    parser = subparsers.add_parser("launch", help="start ranks with mpirun", description=_DESCRIPTION)
    parser.add_argument("-n", dest="num_ranks", metavar="N", type=int, required=True, help="ranks that train")
    parser.add_argument(
        "--spares",
        dest="num_spares",
        metavar="S",
        type=int,
        default=0,
        help="ranks to start beside them, which wait to take the place of one that fails (train only)",
    )
    parser.add_argument(
        "--recovery",
        choices=("on", "off"),
        help="go on inside the run when a rank fails; by default where this machine's MPI can (train only)",
    )
    parser.add_argument(
        "--mpirun-arg",
        dest="mpirun_args",
        metavar="X",
        action="append",
        default=[],
        help="one more argument of mpirun, as --mpirun-arg=--bind-to --mpirun-arg=none",
    )
    parser.add_argument("program", metavar="VERB", help=f"what the ranks run: {' or '.join(MPI_VERBS)}")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out the verb.

    Parameters
    ----------
    args : argparse.Namespace
        ``num_ranks``, ``num_spares``, ``recovery``, ``mpirun_args``, ``program``, ``arguments``.

    Returns
    -------
    int
        The exit code of the run.

    Raises
    ------
    UsageError
        Not a verb for ranks, no ranks, spares that could not be used, a wrong configuration, or no ``mpirun``.
    InUseError, DiskError, RankError, StoppedError
        See `launch`.
    """
    if args.num_ranks < 1:
        raise UsageError(f"-n {args.num_ranks}: the number of ranks must be at least 1")
    if args.program not in MPI_VERBS:
        hint = nearest(args.program, MPI_VERBS) or f"verbs that run on ranks: {', '.join(MPI_VERBS)}"
        raise UsageError(f"launch {args.program}: not a verb that runs on ranks; {hint}")
    program = [*python_command(), "-m", "hpcpipe", args.program, *args.arguments]
    if {"-h", "--help"} & set(args.arguments):
        return os.spawnv(os.P_WAIT, program[0], program)
    _check_recovery(args)
    directory = check_start(args.program, args.arguments, args.num_ranks)
    recovery = args.recovery if args.program == "train" else "off"
    return launch(program, args.num_ranks, directory, args.mpirun_args, num_spares=args.num_spares, recovery=recovery)


def _check_recovery(args: argparse.Namespace) -> None:
    """Refuse spares and recovery where they mean nothing."""
    if args.num_spares < 0:
        raise UsageError(f"--spares {args.num_spares}: the number of spare ranks must be at least 0")
    if args.program != "train" and (args.num_spares or args.recovery == "on"):
        option = f"--spares {args.num_spares}" if args.num_spares else "--recovery on"
        raise UsageError(f"{option}: only `train` goes on when a rank fails; leave the option out for {args.program}")
    if args.num_spares and args.recovery == "off":
        raise UsageError(f"--spares {args.num_spares}: spare ranks have nothing to do with --recovery off")


def launch(
    program: Sequence[str],
    num_ranks: int,
    directory: Path | None,
    mpirun_args: Sequence[str] = (),
    *,
    num_spares: int = 0,
    recovery: str | None = "off",
) -> int:
    """Start a program on ranks and wait for its end.

    Where this launch's ``status.json`` still says that the run is running, or the run ended before it could write
    one, it is written here.

    Parameters
    ----------
    program : sequence of str
        Command that every rank runs.
    num_ranks : int
        Ranks to start, without spares.
    directory : Path or None
        Where the run writes ``status.json``; None for a verb that writes none.
    mpirun_args : sequence of str
        The user's own options of ``mpirun``.
    num_spares : int
        Spare ranks to start.
    recovery : str or None
        Whether the ranks survive each other: ``on``, ``off``, or None: where this MPI can.

    Returns
    -------
    int
        The ``exit_code`` in ``status.json`` where this launch has written it; else ``mpirun``'s, which then is one
        that the ranks have chosen and explained, or 0 of a verb without ``status.json``.

    Raises
    ------
    UsageError
        There is no ``mpirun``, or it refused its options; recovery or spares are asked for, and MPI cannot recover.
    InUseError
        Another run is in the directory; no rank was started.
    DiskError
        The directory could not be made or locked.
    RankError
        The ranks ended without saying why.
    StoppedError
        A stop came before the run had begun, or the ranks were killed at once.
    """
    from hpcpipe.cluster import fault_tolerance, launcher
    from hpcpipe.cluster.supervise import new_launch_id, supervise

    mpirun, machine = launcher.find_mpirun(), launcher.this_machine()
    launch_id = new_launch_id()
    environ = launcher.rank_environment(launch_id, _terminal(), num_spares=num_spares)
    num_started = num_ranks + num_spares
    num_here = num_started if launcher.is_one_node(machine, mpirun_args) else None
    wanted = "on" if num_spares else recovery
    why_not = fault_tolerance.why_not(mpirun, num_started, num_here is not None, wanted, mpirun_args, environ)
    _announce(why_not, recovery, num_spares, environ)
    command = launcher.mpirun_command(
        mpirun, num_started, program, machine, mpirun_args, environ, survives_failures=not why_not
    )

    with _folders(environ, num_here), _locked(directory, environ):
        progress = partial(_progress, directory, launch_id)
        outcome = supervise(command, environ, progress, survives_failures=not why_not, num_ranks=num_here)
    if directory is None and outcome.code == 0 and not outcome.failures:
        return int(ExitCode.DONE)
    try:
        code = conclude(outcome, read_status(directory, launch_id))
    except HpcpipeError as error:
        _end_status(directory, launch_id, error, was_asked=True)
        raise
    if code != ExitCode.DONE:
        was_asked = outcome.was_asked_to_stop or outcome.was_killed
        _end_status(directory, launch_id, BY_CODE.get(code, RankError)(_story(outcome)), was_asked=was_asked)
    return code


@contextlib.contextmanager
def _folders(environ: MutableMapping[str, str], num_here: int | None) -> Iterator[None]:
    """Give the launch folders of its own, which are removed at the end; `num_here`: ranks, if all are on this node."""
    from hpcpipe.cluster.environment import LAUNCH_ID
    from hpcpipe.cluster.launcher import session_folder
    from hpcpipe.cluster.shared_folder import shared_folder
    from hpcpipe.watch.memory import remove_leftovers

    with session_folder(environ), shared_folder(environ, num_here or 0, is_one_node=num_here is not None):
        try:
            yield
        finally:
            # Of ranks that were killed at once with whoever watched them.
            remove_leftovers(environ[LAUNCH_ID])


def _announce(why_not: str, recovery: str | None, num_spares: int, environ: MutableMapping[str, str]) -> None:
    """Let the ranks know why they cannot survive each other; refuse to start where they were to."""
    from hpcpipe.cluster.fault_tolerance import WHY_OFF

    if why_not and (recovery == "on" or num_spares):
        option = "--recovery on" if recovery == "on" else f"--spares {num_spares}"
        raise UsageError(f"{option}: a run cannot go on here when a rank fails: {why_not}")
    if why_not:
        environ[WHY_OFF] = why_not


def conclude(outcome: "Outcome", status: Status | None) -> int:
    """Decide what a finished launch returns.

    Parameters
    ----------
    outcome : Outcome
        How ``mpirun`` ended.
    status : Status or None
        What the run wrote about itself during this launch.

    Returns
    -------
    int
        See `launch`.

    Raises
    ------
    UsageError, RankError, StoppedError
        See `launch`.
    """
    if status is not None and status.exit_code is not None:
        if status.exit_code == ExitCode.DONE and outcome.failures:
            print(f"hpcpipe: note: after the end of the run, {_story(outcome)}", file=sys.stderr)
        elif status.cause and not _TOLD.search(outcome.told):
            # The ranks spoke to an mpirun that did not pass it on.
            kind = "stopped" if status.exit_code == ExitCode.STOPPED else "error"
            print(f"hpcpipe: {kind}: {status.cause}", file=sys.stderr)
        return status.exit_code
    if outcome.was_killed:
        raise StoppedError(
            "every rank was killed at once, as asked; run the same command again to go on from the newest checkpoint"
        )
    if outcome.code in set(ExitCode) - {ExitCode.DONE}:
        return outcome.code
    # The run may have begun between the look at its status and the end of mpirun.
    if outcome.was_ended or (status is None and outcome.was_asked_to_stop and not outcome.has_begun):
        raise StoppedError("asked to stop before the first step; run the same command again")
    if status is None and outcome.code == _MPIRUN_REFUSED:
        raise UsageError("mpirun could not start the ranks, for the reason above; check -n and --mpirun-arg")
    raise RankError(
        f"{_story(outcome)} before the run was done; run the same command again to go on from the newest checkpoint"
    )


def read_status(directory: Path | None, launch_id: str) -> Status | None:
    """Read ``status.json``, where this launch has written it.

    Parameters
    ----------
    directory : Path or None
        The run directory.
    launch_id : str
        Name of this launch.

    Returns
    -------
    Status or None
        None where there is no such file, or another launch's.
    """
    if directory is None:
        return None
    try:
        status = json.loads((directory / "status.json").read_bytes())
    except (OSError, ValueError):
        return None
    if isinstance(status, dict) and status.get("launch_id") != launch_id:
        # What this start said of itself beside the status of a run that is done.
        status = status.get("later_start")
    if not isinstance(status, dict) or status.get("launch_id") != launch_id:
        return None
    exit_code = status.get("exit_code")
    cause = str(status.get("cause") or "")
    return Status(str(status.get("state", "failed")), exit_code if isinstance(exit_code, int) else None, cause)


def _progress(directory: Path | None, launch_id: str) -> "Progress":
    """Return how far the run is, by its own account."""
    from hpcpipe.cluster.supervise import Progress

    status = read_status(directory, launch_id)
    if status is None:
        return Progress.NOT_STARTED
    return Progress.RUNNING if status.exit_code is None else Progress.FINAL


def python_command() -> list[str]:
    """Return the interpreter that finds the same package as this process, whatever the folder it starts in."""
    package_parent = Path(hpcpipe.__file__).resolve().parent.parent
    # -m puts the current folder first on the path, where a user's random.py would hide the library's.
    return [sys.executable] if package_parent == Path.cwd() else [sys.executable, "-P"]


def _end_status(directory: Path | None, launch_id: str, error: HpcpipeError, *, was_asked: bool) -> None:
    """Say in ``status.json`` how the run ended, where its ranks were ended before they could."""
    from hpcpipe.telemetry.status import end_status
    from hpcpipe.train.last_status import write_last_status

    if directory is None:
        return
    if isinstance(error, StoppedError) and was_asked:
        error.by = "signal"
    if read_status(directory, launch_id) is None:
        write_last_status(directory, error, is_first=True, launch_id=launch_id)
        return
    with contextlib.suppress(DiskError):
        end_status(
            directory, launch_id, error.exit_code, str(error), error.by if isinstance(error, StoppedError) else ""
        )


@contextlib.contextmanager
def _locked(directory: Path | None, environ: Mapping[str, str]) -> Iterator[None]:
    """Hold the run directory until rank 0 of this launch takes its lock, or the block ends."""
    from hpcpipe.cluster.holder import this_process
    from hpcpipe.train.directory import RunDirectory, open_directory
    from hpcpipe.train.lock import RunLock

    if directory is None:
        yield
        return
    files = RunDirectory(directory)
    lock = RunLock(files.lock, this_process(environ), _say)
    open_directory(files, lock, _say)
    try:
        yield
    finally:
        lock.release()


def _say(text: str) -> None:
    print(text, flush=True)


def _terminal() -> tuple[int, int] | None:
    """Return the size of the terminal on standard output."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        return None
    # A terminal that was made by a program may have no size.
    return size.columns or 80, size.lines or 24


def _story(outcome: "Outcome") -> str:
    """Say in a clause how the ranks ended."""
    if outcome.failures:
        return str(outcome.failures[0])
    if outcome.losses:
        return " and ".join(map(str, outcome.losses[:_MOST_NAMED]))
    if outcome.code < 0:
        return f"mpirun was ended by signal {-outcome.code}"
    return f"mpirun ended with code {outcome.code}"
