"""Ranks survive the death of one: ``mpirun --with-ft ulfm -n 3 python -m hpcpipe.mpi.recovery_probe``."""

import json
import os
import signal
import sys
import time

import numpy as np

from hpcpipe.errors import ExitCode
from hpcpipe.mpi import runtime
from hpcpipe.mpi.crew import FAULT_TOLERANCE, CommunicationError, Crew

LIMIT_S = 15
_VICTIM = 1
_FEWEST = 3


def main() -> None:
    """Kill a rank, and let the others go on by the calls that recovery uses; one of them prints one JSON object.

    All end with 0 where they did and with 71 where not; ranks that hang are ended by a signal after `LIMIT_S`.
    """
    # A rank that is ended by its alarm does not leave the others waiting.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LIMIT_S)
    world = runtime.start()
    crew = Crew(world.comm, world.rank)
    if not crew.can_recover or crew.size < _FEWEST:
        _say(crew, {"survivors": [], "seconds": None, "trouble": _why_not(crew)})
        runtime.stop(world)
        sys.exit(ExitCode.RANK_FAILED)
    crew.comm.Barrier()
    began = time.monotonic()
    if world.rank == _VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        # Returns only where nobody has died.
        crew.comm.Barrier()
        told = False
    except CommunicationError:
        told = True
    crew.revoke()
    crew.agree(False)
    crew.shrink()
    survivors = crew.exchange(np.array([world.rank, told], np.int64))
    is_right = crew.agree(True) and [*survivors[:, 0]] == [rank for rank in range(world.size) if rank != _VICTIM]
    seconds = time.monotonic() - began
    trouble = "" if is_right and survivors[:, 1].all() else "not every rank heard of the death of another"
    _say(crew, {"survivors": survivors[:, 0].tolist(), "seconds": round(seconds, 4), "trouble": trouble})
    runtime.leave(crew.comm, int(ExitCode.RANK_FAILED if trouble else ExitCode.DONE))


def _why_not(crew: Crew) -> str:
    """Say why nothing is tried."""
    if crew.size < _FEWEST:
        return f"a rank sees {crew.size}: mpi4py's library is not this launcher's"
    if os.environ.get(FAULT_TOLERANCE) != "1":
        return "the ranks were started without MPI's fault tolerance"
    return f"{runtime.library_version()}, which mpi4py loads, does not revoke communicators"


def _say(crew: Crew, facts: dict[str, object]) -> None:
    if crew.rank == 0:
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
