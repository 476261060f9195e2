"""The ranks that ``mpirun`` has started on this node, and which of them have ended.

Under MPI's fault tolerance ``mpirun`` says nothing of a rank that ends: its processes are all there is to see.
"""

import os
import time

from hpcpipe.cluster.banner import Failure
from hpcpipe.cluster.processes import children, is_running, variable

_RANK = "OMPI_COMM_WORLD_RANK"
_RECENT_S = 10.0


class RankProcesses:
    """The children of ``mpirun``.

    Parameters
    ----------
    mpirun : int
        Its process.
    num_ranks : int or None
        Ranks to expect on this node; None where that is not known.

    Attributes
    ----------
    num_children : int
        Children at the last look, ranks or not.
    """

    def __init__(self, mpirun: int, num_ranks: int | None) -> None:
        self.num_children = 0
        self._mpirun = mpirun
        self._num_ranks = num_ranks
        self._ranks: dict[int, int] = {}
        self._lost: set[int] = set()
        self._first: list[int] = []
        self._first_at = 0.0
        self._found_some = False

    @property
    def num_lost(self) -> int:
        """Ranks that have ended so far, also before they were seen."""
        return len(self._lost)

    def look(self) -> None:
        """Look which children are there."""
        alive = children(self._mpirun)
        # Of an mpirun that has just ended they are not children any more.
        if not is_running(self._mpirun):
            return
        self.num_children = len(alive)
        for pid in alive:
            if pid not in self._ranks and (rank := variable(pid, _RANK)) is not None:
                self._ranks[pid] = int(rank)
        here = {self._ranks[pid] for pid in alive if pid in self._ranks}
        # A child that has not become a rank yet still has mpirun's environment.
        is_complete = bool(here) and all(pid in self._ranks for pid in alive)
        expected = set(range(self._num_ranks or 0)) if is_complete else set()
        new = ({*self._ranks.values()} | expected) - here - self._lost
        if new and not self._found_some:
            self._first, self._first_at = sorted(new), time.monotonic()
        self._found_some = bool(new)
        self._lost |= new

    def lost_last(self) -> tuple[Failure, ...]:
        """Return the ranks with which the last series of ends began, none if it was long ago."""
        if time.monotonic() - self._first_at > _RECENT_S:
            return ()
        return tuple(Failure(rank, f"on {os.uname().nodename} has ended") for rank in self._first)
