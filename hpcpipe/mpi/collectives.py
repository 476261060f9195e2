"""Collective operations with a deadline, whose results have the same bits on every rank and in every run."""

import numpy as np
from mpi4py import MPI

from hpcpipe.mpi.wait import Waiter


def barrier(comm: MPI.Intracomm, waiter: Waiter) -> None:
    """Wait until every rank of the communicator is here."""
    waiter.wait([comm.Ibarrier()], lambda: f"all {comm.size} ranks to meet")


def gather_rows(comm: MPI.Intracomm, waiter: Waiter, row: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Give every rank the rows of all ranks.

    Parameters
    ----------
    comm : Comm
        The ranks that take part; all call it.
    waiter : Waiter
        Waits, with its deadline.
    row : ndarray, shape (n,)
        The caller's row: same length and dtype on every rank.
    out : ndarray, shape (ranks, n), optional
        The caller's, C-contiguous and of the same dtype: where the rows go.

    Returns
    -------
    ndarray, shape (ranks, n)
        Row r is rank r's.
    """
    row = np.ascontiguousarray(row)
    rows = np.empty((comm.size, *row.shape), row.dtype) if out is None else out
    waiter.wait([comm.Iallgather(row, rows)], lambda: f"a row from each of {comm.size} ranks")
    return rows


def broadcast_bytes(comm: MPI.Intracomm, waiter: Waiter, content: bytes | None, root: int) -> bytes:
    """Give every rank the bytes of the root; the others pass None."""
    size = np.array([len(content) if content is not None else 0], np.int64)
    waiter.wait([comm.Ibcast(size, root)], lambda: f"a size from rank {root}")
    buffer = np.empty(int(size[0]), np.uint8)
    if content is not None:
        buffer[:] = np.frombuffer(content, np.uint8)
    waiter.wait([comm.Ibcast(buffer, root)], lambda: f"{size[0]} bytes from rank {root}")
    return buffer.tobytes()


def tree_sum(parts: list[np.ndarray]) -> np.ndarray:
    """Sum arrays in the fixed order of a binary counter, into the first of each pair.

    Neighbours are added first, then neighbouring pairs, and so on: ``((0+1)+(2+3))+4`` for five parts. A rank that adds
    its own aligned block of a power of two parts in this order, and then adds the blocks in this order, gets the same
    bits as one that adds all parts.

    Parameters
    ----------
    parts : list of ndarray
        Overwritten.

    Returns
    -------
    ndarray
        ``parts[0]``, which holds the sum.
    """
    stride = 1
    while stride < len(parts):
        for first in range(0, len(parts) - stride, 2 * stride):
            np.add(parts[first], parts[first + stride], out=parts[first])
        stride *= 2
    return parts[0]


def gather_bytes(comm: MPI.Intracomm, waiter: Waiter, content: bytes) -> list[bytes]:
    """Give every rank the bytes of all ranks, which may differ in length."""
    sizes = gather_rows(comm, waiter, np.array([len(content)], np.int64))[:, 0]
    row = np.zeros(int(sizes.max()), np.uint8)
    row[: len(content)] = np.frombuffer(content, np.uint8)
    rows = gather_rows(comm, waiter, row)
    return [rows[rank, : sizes[rank]].tobytes() for rank in range(comm.size)]


def gather_bytes_at(comm: MPI.Intracomm, waiter: Waiter, content: bytes, root: int) -> list[bytes]:
    """Give one rank the bytes of all ranks, which may differ in length; the others get an empty list."""
    sizes = np.zeros(comm.size if comm.rank == root else 0, np.int64)
    waiter.wait([comm.Igather(np.array([len(content)], np.int64), sizes, root)], lambda: "sizes from all ranks")
    ends = np.cumsum(sizes)
    received = np.empty(int(ends[-1]) if comm.rank == root else 0, np.uint8)
    layout = [received, (sizes, ends - sizes), MPI.BYTE] if comm.rank == root else None
    waiter.wait([comm.Igatherv(np.frombuffer(content, np.uint8), layout, root)], lambda: "bytes from all ranks")
    return [received[end - size : end].tobytes() for size, end in zip(sizes, ends, strict=True)]
