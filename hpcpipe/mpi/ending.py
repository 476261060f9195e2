"""How a process leaves others that survive it, and what it knows of their end.

Under MPI's fault tolerance a process that exits with a code, calls MPI_Abort or ends with an exception neither tells
the others nor ends the job, which then hangs for good: one that leaves alone must die by a signal.
"""

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from mpi4py import MPI

from hpcpipe.cluster.fault_tolerance import WHY_OFF
from hpcpipe.mpi.crew import has_fault_tolerance


def die(comm: MPI.Intracomm) -> NoReturn:
    """End this process alone, so that the others learn of it.

    Parameters
    ----------
    comm : Comm
        All live processes; those that wait in it wake up with an error.
    """
    revoke(comm)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process has survived SIGKILL")


def revoke(comm: MPI.Intracomm) -> None:
    """End all communication of a communicator on all its processes."""
    with suppress(MPI.Exception):
        comm.Revoke()


def is_broken(comm: MPI.Intracomm) -> bool:
    """Return whether a process of a communicator has died or left it, as far as this one has heard."""
    with suppress(MPI.Exception):
        # Looking alone makes no progress.
        comm.Iprobe()
        return bool(comm.Is_revoked()) or bool(dead_processes(comm))
    return True


def dead_processes(comm: MPI.Intracomm) -> list[int]:
    """Return the numbers of the processes of a communicator that this one knows to be dead, ascending."""
    with suppress(MPI.Exception):
        failed, everyone = comm.Get_failed(), comm.Get_group()
        numbers = MPI.Group.Translate_ranks(failed, None, everyone)
        failed.Free()
        everyone.Free()
        return sorted(numbers)
    return []


def fault_tolerance_note(num_processes: int) -> str:
    """Say that and why the run cannot go on when a rank fails, to be read on from "recovery:"; empty if it can.

    Parameters
    ----------
    num_processes : int
        Processes of the launch.
    """
    if has_fault_tolerance() or num_processes < 2:
        return ""
    why = os.environ.get(WHY_OFF) or (
        "MPI's fault tolerance was not asked for when the ranks were started; `hpcpipe launch` does, as does"
        " `mpirun --with-ft ulfm` of Open MPI 5"
    )
    return f"off ({why}): if a rank fails the run ends, and goes on from its newest checkpoint at the next start"
