"""How a rank leaves a run that failed: who speaks, what ``status.json`` says, and that nobody stays behind."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from hpcpipe.errors import ExitCode, HpcpipeError, RankError
from hpcpipe.mpi import ending, runtime
from hpcpipe.mpi.crew import CommunicationError, Crew, has_fault_tolerance
from hpcpipe.mpi.runtime import World
from hpcpipe.train.last_status import has_last_word, write_last_status

_LOOK_S = 0.02
_SPEAK_S = 0.5
_LONGEST_SPEAK_S = 2.0


class Outcome:
    """How a block under `leaving_together` ended; its code counts only if the block raised.

    Attributes
    ----------
    code : ExitCode
        What the process returns.
    speaks : callable
        Whether this process tells an error that all ranks raise; the block may replace it.
    crew : Crew or None
        All live processes, if the block says so.
    """

    code = ExitCode.DONE

    def __init__(self, speaks: Callable[[], bool]) -> None:
        self.speaks = speaks
        self.crew: Crew | None = None


@contextlib.contextmanager
def leaving_together(world: World, directory: Path | None) -> Iterator[Outcome]:
    """Run a block, and let every rank leave when it fails.

    An error that all ranks raise is told by rank 0, and the block ends normally on every rank, with its code. One
    that hits a single rank is told by that rank, which then ends the others; so does any other exception, with its
    traceback. Where processes survive each other, that rank dies and its death makes the others leave, silently; once
    they can go on without it, they do.

    Parameters
    ----------
    world : World
        All ranks.
    directory : Path or None
        Where ``status.json`` goes; None if the configuration does not say.
    """
    outcome = Outcome(lambda: world.rank == 0)
    began_s = time.time()
    try:
        yield outcome
    except HpcpipeError as error:
        outcome.code = error.exit_code
        if error.on_all_ranks:
            if outcome.speaks():
                _tell(world, error)
                write_last_status(directory, error, is_first=True)
            return
        if _others_survive(world):
            _leave_survivors(world, outcome, directory, error, began_s)
        _let_lower_ranks_speak(world)
        _tell(world, error)
        write_last_status(directory, error, is_first=outcome.speaks())
        runtime.abort(error.exit_code)
    except BaseException as error:
        if _others_survive(world):
            _leave_survivors(world, outcome, directory, error, began_s)
        _let_lower_ranks_speak(world)
        _report(world)
        write_last_status(directory, _as_failure(world, error), is_first=world.rank == 0)
        runtime.abort(ExitCode.RANK_FAILED)
        raise


def _others_survive(world: World) -> bool:
    return world.size > 1 and has_fault_tolerance()


def _leave_survivors(
    world: World, outcome: Outcome, directory: Path | None, error: BaseException, began_s: float
) -> NoReturn:
    """Die; if the others cannot go on alone, the first of those who leave says why."""
    # A stop request of the user must not be swallowed meanwhile.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if outcome.crew is not None:
        _report(world)
        outcome.crew.revoke()
        ending.die(outcome.crew.comm)
    is_told = isinstance(error, CommunicationError) and ending.is_broken(world.comm)
    if is_told:
        # Whoever waits for this process has to leave too.
        ending.revoke(world.comm)
        error = RankError(_describe_dead(world))
    turn_s = time.monotonic() + min(_SPEAK_S * world.rank, _LONGEST_SPEAK_S)
    while not has_last_word(directory, began_s):
        if time.monotonic() < turn_s:
            time.sleep(_LOOK_S)
            continue
        if isinstance(error, HpcpipeError):
            _tell(world, error.on_all() if is_told else error)
        else:
            _report(world)
        last = error if isinstance(error, HpcpipeError) else _as_failure(world, error)
        write_last_status(directory, last, is_first=world.rank == 0)
        break
    ending.die(world.comm)


def _describe_dead(world: World) -> str:
    """Say who is missing."""
    dead = ending.dead_processes(world.comm)
    numbers = ", ".join(map(str, dead))
    who = f"rank{'s' if len(dead) > 1 else ''} {numbers} of {world.size}" if dead else "a rank"
    return f"{who} died while the run was started; run the same command again to go on from the newest checkpoint"


def _report(world: World) -> None:
    with contextlib.suppress(OSError, ValueError):
        runtime.report_traceback(f"rank {world.rank} of {world.size}")


def _as_failure(world: World, error: BaseException) -> HpcpipeError:
    return HpcpipeError(f"rank {world.rank}: {type(error).__name__}: {error}")


def _let_lower_ranks_speak(world: World) -> None:
    """Wait a moment: if a lower rank met the same error, it tells it and ends this rank meanwhile."""
    # The launcher ends ranks with SIGTERM, which so far was a request to stop after the step.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(min(_SPEAK_S * world.rank, _LONGEST_SPEAK_S))


def _tell(world: World, error: HpcpipeError) -> None:
    """Print an error once, with its rank if only one rank met it."""
    where = "" if error.on_all_ranks else f"rank {world.rank} of {world.size}: "
    kind = "stopped" if error.exit_code is ExitCode.STOPPED else "error"
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"hpcpipe: {kind}: {where}{error}\n")
        sys.stderr.flush()
