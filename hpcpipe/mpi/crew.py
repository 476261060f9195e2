"""All live processes of a launch, and the calls of MPI's fault tolerance that bring them together after a failure.

The sequence in which a run uses them, and why, is in docs/recovery.md. Two rules keep it free of deadlocks: whoever
sees a failure revokes every communicator, and every process calls `agree` and `shrink` in the same order, since both
run agreements on the same communicator.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import cast

import numpy as np
from mpi4py import MPI

from hpcpipe.mpi.grid import Grid, make_grid

FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"
"""Variable that ``mpirun --with-ft`` sets to 1. Without it revoking does nothing and shrinking hangs."""

CommunicationError = MPI.Exception
"""What every call on a communicator may raise when a process has died or others have left it."""

_SETTLE_S = 0.01
_TOLD = 1


def has_fault_tolerance() -> bool:
    """Return whether the launcher has switched MPI's fault tolerance on, and this library has it; MPI must be up."""
    return os.environ.get(FAULT_TOLERANCE) == "1" and _can_revoke()


@cache
def _can_revoke() -> bool:
    """Try to revoke a communicator: mpi4py has the names also where the library has nothing behind them."""
    own = MPI.COMM_SELF.Dup()
    try:
        own.Revoke()
        return bool(own.Is_revoked())
    except (MPI.Exception, NotImplementedError):
        return False
    finally:
        own.Free()


class Crew:
    """The processes that are alive: ranks that train, and spares.

    Parameters
    ----------
    comm : Comm
        All processes; this object's from now on.
    process : int
        The number of this process in the launch, which it keeps for ever.

    Attributes
    ----------
    process : int
        As above.
    can_recover : bool
        Whether the death of a process can be survived.
    has_changed : bool
        Whether processes have died, so that MPI may hang where it ends.
    """

    def __init__(self, comm: MPI.Intracomm, process: int) -> None:
        self.comm = comm
        self.process = process
        self.can_recover = has_fault_tolerance()
        self.has_changed = False
        self._grid: Grid | None = None
        self._told: list[tuple[bytes, MPI.Request]] = []

    @property
    def rank(self) -> int:
        """The place of this process among the live ones; it moves up when a lower one has died."""
        return int(self.comm.rank)

    @property
    def size(self) -> int:
        """Number of processes, dead ones included until the next `shrink`."""
        return int(self.comm.size)

    def revoke(self) -> None:
        """End all communication of all processes: every call under way and every later one raises."""
        for comm in (*(self._grid.communicators() if self._grid else ()), self.comm):
            with suppress(MPI.Exception):
                comm.Revoke()

    def is_revoked(self) -> bool:
        """Return whether some process has revoked the communicator; a look that costs nothing."""
        return self.can_recover and bool(self.comm.Is_revoked())

    def dead(self) -> list[int]:
        """Return the processes that are known to have died since the last `shrink`, without waiting for news."""
        if not self.can_recover:
            return []
        failed = self.comm.Get_failed()
        count = int(failed.Get_size())
        ranks: list[int] = []
        if count:
            everyone = self.comm.Get_group()
            ranks = [int(rank) for rank in failed.Translate_ranks(range(count), everyone)]
            everyone.Free()
        failed.Free()
        return ranks

    def agree(self, flag: bool) -> bool:
        """Return whether all live processes said yes, on all of them alike; no if one has died.

        Nobody acknowledges failures, so that where a process is dead the call raises on all, which counts as no.
        """
        try:
            return bool(self.comm.Agree(int(flag)))
        except MPI.Exception:
            return False

    def shrink(self) -> None:
        """Go on with a communicator of the processes that are alive, which keep their order.

        Waits a moment first, so that failures at the same time are all known.
        """
        time.sleep(_SETTLE_S)
        alive = cast(MPI.Intracomm, self.comm.Shrink())
        self.leave_grid()
        self.comm.Free()
        self.comm, self._told = alive, []
        self.has_changed = True

    def leave_grid(self) -> None:
        """Free the communicators of the grid."""
        if self._grid is not None:
            with suppress(MPI.Exception):
                self._grid.free()
            self._grid = None

    def exchange(self, row: np.ndarray) -> np.ndarray:
        """Return the rows of all processes, in their order; every row has the same length and dtype.

        Raises
        ------
        CommunicationError
            A process has died.
        """
        rows = np.empty((self.size, *row.shape), row.dtype)
        self.comm.Allgather(row, rows)
        return rows

    def hear(self, content: bytes | None, root: int) -> bytes:
        """Give every process the bytes of one; the others pass None.

        Raises
        ------
        CommunicationError
            A process has died.
        """
        size = np.array([0 if content is None else len(content)], np.int64)
        self.comm.Bcast(size, root)
        buffer = np.empty(int(size[0]), np.uint8)
        if content is not None:
            buffer[:] = np.frombuffer(content, np.uint8)
        self.comm.Bcast(buffer, root)
        return buffer.tobytes()

    def form_grid(self, role: int, pipeline: int, data: int) -> Grid | None:
        """Lay the grid over the processes that have a role; all processes call it.

        Parameters
        ----------
        role : int
            The rank of this process in the grid; -1 for a spare.
        pipeline, data : int
            Degrees.

        Returns
        -------
        Grid or None
            None for a spare.

        Raises
        ------
        CommunicationError
            A process has died.
        """
        comm = cast(MPI.Intracomm, self.comm.Split(0 if role >= 0 else MPI.UNDEFINED, max(role, 0)))
        if role < 0:
            return None
        self._grid = make_grid(comm, pipeline, data, owns_comm=True)
        return self._grid

    def tell(self, ranks: Sequence[int], content: bytes) -> None:
        """Send bytes to processes that `listen`, without waiting; what is lost on the way was for the dead."""
        for rank in ranks:
            with suppress(MPI.Exception):
                self._told.append((content, self.comm.Isend(np.frombuffer(content, np.uint8), rank, _TOLD)))

    def listen(self, root: int) -> bytes | None:
        """Return the oldest bytes that a process has sent with `tell`, None if there are none; does not wait.

        Raises
        ------
        CommunicationError
            That process has died, or the communicator was revoked.
        """
        status = MPI.Status()
        if not self.comm.Iprobe(root, _TOLD, status):
            return None
        buffer = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        self.comm.Recv(buffer, root, _TOLD)
        return buffer.tobytes()
