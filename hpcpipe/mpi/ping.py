"""How long a message takes between two ranks."""

import statistics
import time

import numpy as np
from mpi4py import MPI

from hpcpipe.mpi.channel import Channel
from hpcpipe.mpi.collectives import barrier, gather_rows
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


def measure_pair(
    comm: MPI.Intracomm, waiter: Waiter, channel: Channel, num_bytes: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Send messages between neighbours as a pipeline does: receives posted ahead, sends that do not block.

    Ranks 0 and 1, 2 and 3 and so on are neighbours; all pairs measure at the same time, and a last rank without a
    neighbour looks on.

    Parameters
    ----------
    comm : Comm
        The ranks that talk; all call it.
    waiter : Waiter
        Waits, with its deadline.
    channel : Channel
        Between them.
    num_bytes : int
        Size of each message.
    rounds : int
        How often; three more come before them.

    Returns
    -------
    one_way_s : list of float
        For each round half of a round trip: from the start of a send until the receiver has the message. Empty on
        ranks other than the first of a pair.
    both_ways_s : list of float
        For each round, until two messages that neighbours send each other at the same time are there. Empty likewise.
    """
    barrier(comm, waiter)
    peer, is_first = comm.rank ^ 1, comm.rank % 2 == 0
    if peer >= comm.size:
        return [], []
    buffers = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    one_way_s = _ping(channel, peer, is_first, buffers, rounds + _WARMUP)[_WARMUP:]
    both_ways_s = _exchange(channel, peer, buffers, rounds + _WARMUP)[_WARMUP:]
    return (one_way_s, both_ways_s) if is_first else ([], [])


def _ping(
    channel: Channel, peer: int, is_first: bool, buffers: tuple[np.ndarray, np.ndarray], rounds: int
) -> list[float]:
    """Return half of each round trip."""
    outbox, inbox = buffers
    taken = []
    if not is_first:
        channel.post_receive("to the second", inbox, peer, 0)
    for left in reversed(range(rounds)):
        if is_first:
            channel.post_receive("to the first", inbox, peer, 0)
            start = time.perf_counter()
            channel.start_send("from the first", outbox, peer, 0)
            channel.wait("to the first")
            taken.append((time.perf_counter() - start) / 2)
            channel.wait("from the first")
        else:
            channel.wait("to the second")
            if left:
                channel.post_receive("to the second", inbox, peer, 0)
            channel.start_send("from the second", outbox, peer, 0)
            channel.wait("from the second")
    return taken


def _exchange(channel: Channel, peer: int, buffers: tuple[np.ndarray, np.ndarray], rounds: int) -> list[float]:
    """Return the time of each round of two messages."""
    outbox, inbox = buffers
    taken = []
    for _ in range(rounds):
        channel.post_receive("both ways, in", inbox, peer, 1)
        start = time.perf_counter()
        channel.start_send("both ways, out", outbox, peer, 1)
        channel.wait("both ways, in")
        channel.wait("both ways, out")
        taken.append(time.perf_counter() - start)
    return taken
