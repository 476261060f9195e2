"""Collective operations with a deadline, whose results have the same bits on every rank and in every run."""

import numpy as np
from mpi4py import MPI

from hpcpipe.mpi.wait import Waiter

_CHUNK = 1 << 20


def barrier(comm: MPI.Intracomm, waiter: Waiter) -> None:
    """Wait until every rank of the communicator is here."""
    waiter.wait([comm.Ibarrier()], lambda: f"all {comm.size} ranks to meet")


def gather_rows(comm: MPI.Intracomm, waiter: Waiter, row: np.ndarray) -> np.ndarray:
    """Give every rank the rows of all ranks.

    Parameters
    ----------
    comm : Comm
        The ranks that take part; all call it.
    waiter : Waiter
        Waits, with its deadline.
    row : ndarray, shape (n,)
        The caller's row: same length and dtype on every rank.

    Returns
    -------
    ndarray, shape (ranks, n)
        Row r is rank r's.
    """
    row = np.ascontiguousarray(row)
    rows = np.empty((comm.size, *row.shape), row.dtype)
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


def exchange(comm: MPI.Intracomm, waiter: Waiter, peer: int, send: np.ndarray, receive: np.ndarray) -> None:
    """Swap one array with a peer, which calls it too; both arrays are the caller's, contiguous and of one size."""
    requests = [comm.Irecv(receive, peer, 0), comm.Isend(send, peer, 0)]
    waiter.wait(requests, lambda: f"{receive.nbytes} bytes from rank {peer}")


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


def sum_over_ranks(comm: MPI.Intracomm, waiter: Waiter, array: np.ndarray) -> None:
    """Replace an array by its sum over all ranks, in the order of `tree_sum`, with the same bits on all.

    Each rank sums one share of a chunk and sends the result to the others, so every element travels twice whatever the
    number of ranks, and the order of the additions does not depend on the MPI library.

    Parameters
    ----------
    comm : Comm
        The ranks that take part; all call it.
    waiter : Waiter
        Waits, with its deadline.
    array : ndarray, shape (n,)
        Contiguous; replaced in place.
    """
    if comm.size == 1:
        return
    for start in range(0, array.size, _CHUNK * comm.size):
        _sum_chunk(comm, waiter, array[start : start + _CHUNK * comm.size])


def _sum_chunk(comm: MPI.Intracomm, waiter: Waiter, chunk: np.ndarray) -> None:
    bounds = [chunk.size * rank // comm.size for rank in range(comm.size + 1)]
    shares = [chunk[bounds[rank] : bounds[rank + 1]] for rank in range(comm.size)]
    own = shares[comm.rank]
    others = [rank for rank in range(comm.size) if rank != comm.rank]

    parts = [own.copy() if rank == comm.rank else np.empty_like(own) for rank in range(comm.size)]
    requests = [comm.Irecv(parts[rank], rank, 0) for rank in others]
    requests += [comm.Isend(shares[rank], rank, 0) for rank in others]
    waiter.wait(requests, lambda: f"gradient shares of {len(others)} replicas")

    own[...] = tree_sum(parts)
    requests = [comm.Irecv(shares[rank], rank, 1) for rank in others]
    requests += [comm.Isend(own, rank, 1) for rank in others]
    waiter.wait(requests, lambda: f"summed gradients of {len(others)} replicas")


def gather_bytes(comm: MPI.Intracomm, waiter: Waiter, content: bytes) -> list[bytes]:
    """Give every rank the bytes of all ranks, which may differ in length."""
    sizes = gather_rows(comm, waiter, np.array([len(content)], np.int64))[:, 0]
    row = np.zeros(int(sizes.max()), np.uint8)
    row[: len(content)] = np.frombuffer(content, np.uint8)
    rows = gather_rows(comm, waiter, row)
    return [rows[rank, : sizes[rank]].tobytes() for rank in range(comm.size)]
