"""Reduce-scatter and all-gather between shards: bits of the fixed tree, whatever the cuts, windows and delays."""

import time

import numpy as np
import pytest
from support.hard_messages import MODE

from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.collectives import tree_sum
from hpcpipe.mpi.shards import ShardExchange, message_elements, receive_elements
from hpcpipe.mpi.wait import Waiter

pytestmark = pytest.mark.mpi(min_size=2)

HARD = MessageMode(synchronous=True, max_delay_s=0.002)


def cuts_of(size, num_shards, seed):
    """Return bounds of shards of any sizes, empty ones included."""
    inner = np.random.default_rng([seed, size]).integers(0, size + 1, num_shards - 1)
    return [0, *sorted(inner.tolist()), size]


def parts_of(comm, number, size):
    return [np.random.default_rng([number, rank]).normal(size=size).astype(np.float32) for rank in range(comm.size)]


def received(comm, largest_shard):
    return np.empty(receive_elements(comm.size, largest_shard), np.float32)


@pytest.mark.parametrize("mode", [MessageMode(), HARD], ids=["", "synchronous"])
@pytest.mark.parametrize("window", [1, 7, 1 << 16])
def test_sums_and_copies_have_the_bits_of_the_fixed_tree(comm, monkeypatch, mode, window):
    monkeypatch.setattr("hpcpipe.mpi.shards._SMALLEST_MESSAGE", window)
    monkeypatch.setattr("hpcpipe.mpi.shards._LARGEST_MESSAGE", window)
    sizes = [1, 2, 30, 31, 0, 17] if window < 7 or mode is HARD or MODE.max_delay_s else [1, 1000, 65_537, 0, 300]
    exchange = ShardExchange(comm, Waiter(60.0), mode, received(comm, max(sizes)))
    cuts = [cuts_of(size, comm.size, number) for number, size in enumerate(sizes)]
    arrays = [parts_of(comm, number, size)[comm.rank] for number, size in enumerate(sizes)]
    before = [array.copy() for array in arrays]
    for number, array in enumerate(arrays):
        exchange.reduce_scatter(f"array {number}", array, cuts[number])
        exchange.advance()
    exchange.finish()
    totals = [tree_sum(parts_of(comm, number, size)) for number, size in enumerate(sizes)]
    for array, total, old, bounds in zip(arrays, totals, before, cuts, strict=True):
        own = slice(*bounds[comm.rank : comm.rank + 2])
        assert array[own].tobytes() == total[own].tobytes()
        old[own] = total[own]
        assert array.tobytes() == old.tobytes(), "the other shards keep what they had"
    for number, array in enumerate(arrays):
        exchange.all_gather(f"array {number}", array, cuts[number])
    exchange.finish()
    for array, total in zip(arrays, totals, strict=True):
        assert array.tobytes() == total.tobytes()


def test_transfers_move_while_ranks_compute_and_wait_for_others(comm):
    waiter = Waiter(60.0)
    size = 3 * message_elements(comm.size) * comm.size
    cuts = [size * rank // comm.size for rank in range(comm.size + 1)]
    exchange = ShardExchange(comm, waiter, MessageMode(), received(comm, size))
    waiter.background = [exchange.advance]
    array = np.full(size, comm.rank + 1, np.float32)
    own = array[cuts[comm.rank] : cuts[comm.rank + 1]]
    exchange.reduce_scatter("array", array, cuts)
    total = sum(range(1, comm.size + 1))
    if comm.rank == 0:
        # Polling alone completes it.
        deadline = time.monotonic() + 60
        while not (own == total).all() and time.monotonic() < deadline:
            exchange.advance()
        comm.Isend(np.zeros(1), 1, 9).Wait()
    elif comm.rank == 1:
        # So does waiting for something else.
        waiter.wait([comm.Irecv(np.empty(1), 0, 9)], lambda: "rank 0")
    else:
        exchange.finish()
    exchange.finish()
    assert (own == total).all()


def test_memory_to_receive_into_is_bounded():
    for num_replicas in (1, 2, 3, 8, 64):
        assert receive_elements(num_replicas, 10**9) <= max(1 << 20, (num_replicas - 1) << 16)
        assert receive_elements(num_replicas, 5) == 5 * (num_replicas - 1)


class TellingWaiter(Waiter):
    """Keeps what it was told to say if it gave up."""

    def __init__(self):
        super().__init__(60.0)
        self.told = []

    def wait(self, requests, what, *other):
        self.told.append(what())
        super().wait(requests, what, *other)


def test_what_is_waited_for_has_a_name(comm):
    array = np.zeros(1000, np.float32)
    cuts = [1000 * rank // comm.size for rank in range(comm.size + 1)]
    waiter = TellingWaiter()
    exchange = ShardExchange(comm, waiter, MessageMode(synchronous=True), received(comm, 1000))
    if comm.rank == 0:
        time.sleep(0.3)
    exchange.reduce_scatter("REDUCE0", array, cuts)
    exchange.finish()
    if comm.rank != 0:
        assert "the other end of message REDUCE0 from replica 0" in waiter.told
