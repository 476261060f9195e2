"""How a rank leaves a run that failed: who speaks, what ``status.json`` says, and that nobody stays behind."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hpcpipe.errors import ExitCode, HpcpipeError
from hpcpipe.mpi import runtime
from hpcpipe.mpi.crew import Crew
from hpcpipe.mpi.runtime import World
from hpcpipe.train.last_status import write_last_status

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
    traceback.

    Parameters
    ----------
    world : World
        All ranks.
    directory : Path or None
        Where ``status.json`` goes; None if the configuration does not say.
    """
    outcome = Outcome(lambda: world.rank == 0)
    try:
        yield outcome
    except HpcpipeError as error:
        outcome.code = error.exit_code
        if not error.on_all_ranks:
            _let_lower_ranks_speak(world)
        if outcome.speaks() or not error.on_all_ranks:
            _tell(world, error)
            write_last_status(directory, error, is_first=outcome.speaks())
        if not error.on_all_ranks:
            runtime.abort(error.exit_code)
    except BaseException as error:
        _let_lower_ranks_speak(world)
        with contextlib.suppress(OSError, ValueError):
            runtime.report_traceback(world)
        cause = f"rank {world.rank}: {type(error).__name__}: {error}"
        write_last_status(directory, HpcpipeError(cause), is_first=world.rank == 0)
        runtime.abort(ExitCode.RANK_FAILED)
        raise


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
