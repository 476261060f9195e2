"""How long a message takes between two ranks."""

import statistics
import time

import numpy as np
from mpi4py import MPI

from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.wait import Waiter

_ROUNDS = 20
_WARMUP = 3


def measure_message_s(comm: MPI.Intracomm, waiter: Waiter, num_bytes: int) -> float:
    """Return the seconds from the start of a send until the receiver has the message, the slowest pair's median.

    Ranks 0 and 1, 2 and 3 and so on play ping-pong, all pairs at the same time; half a round trip counts.

    Parameters
    ----------
    comm : Comm
        The ranks that talk; all call it.
    waiter : Waiter
        Waits, with its deadline.
    num_bytes : int
        Size of the message.

    Returns
    -------
    float
        0 where there is only one rank.
    """
    peer = comm.rank ^ 1
    taken = [0.0]
    if peer < comm.size:
        buffer = np.zeros(num_bytes, np.uint8)
        taken = [_round_trip(comm, waiter, peer, buffer) / 2 for _ in range(_ROUNDS)][_WARMUP:]
    return float(gather_rows(comm, waiter, np.array([statistics.median(taken)])).max())


def _round_trip(comm: MPI.Intracomm, waiter: Waiter, peer: int, buffer: np.ndarray) -> float:
    def send() -> None:
        waiter.wait([comm.Isend(buffer, peer, 0)], lambda: f"rank {peer} to take {buffer.nbytes} bytes")

    def receive() -> None:
        waiter.wait([comm.Irecv(buffer, peer, 0)], lambda: f"{buffer.nbytes} bytes from rank {peer}")

    start = time.perf_counter()
    for move in (send, receive) if comm.rank < peer else (receive, send):
        move()
    return time.perf_counter() - start
