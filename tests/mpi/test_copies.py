"""Copies of a rank's state in its own and its neighbour's memory, and moves between processes."""

import os

import numpy as np
import pytest
from support.hard_messages import MODE

from hpcpipe.kernels.digest import digest
from hpcpipe.mpi.channel import Channel
from hpcpipe.mpi.grid import line_grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.recovery.copies import Copies, kept_by
from hpcpipe.recovery.transfer import Entry, Parts, carry_out, plan_moves

pytestmark = pytest.mark.mpi(min_size=2)

both = pytest.mark.parametrize("far", [False, True], ids=["mapped", "sent"])

# Empty ones, and more than one chunk and one message.
SIZES = (3, 0, 70_000, 1, 700_001)


def sizes_of(rank):
    return [size + 5 * rank for size in SIZES]


def state_of(rank, step):
    """The parts of a rank after a step."""
    rng = np.random.default_rng([rank, step])
    return [rng.standard_normal(size, np.float32) for size in sizes_of(rank)]


def connect(copies, comm, waiter, far):
    """Find the neighbours, as if every rank were on a machine of its own if `far`."""
    hosts = [str(rank * far) for rank in range(comm.size)]
    copies.connect(
        line_grid(comm),
        waiter,
        MODE,
        {rank: sizes_of(rank) for rank in range(comm.size)},
        hosts,
        comm.allgather(os.getpid()),
    )


def make(comm, far, every=1, *, knows=True):
    """A rank's live parts, and their copies."""
    live = state_of(comm.rank, 0)

    def digests(step):
        return [digest(part) for part in state_of(comm.rank, step)] if knows else ()

    copies = Copies(live, every, digests)
    waiter = Waiter(60.0)
    waiter.background.append(copies.advance)
    connect(copies, comm, waiter, far)
    return live, copies


def update(live, rank, step):
    for part, new in zip(live, state_of(rank, step), strict=True):
        part[...] = new


def flat(rank, step):
    return np.concatenate(state_of(rank, step))


@both
def test_the_two_newest_versions_are_kept(comm, far):
    live, copies = make(comm, far)
    left = kept_by(comm.rank, comm.size, 1)
    for step in range(6):
        update(live, comm.rank, step)
        copies.begin(step)
        for _ in range(step):
            copies.advance()
        comm.Barrier()
        if step:
            assert copies.own(step - 1).tobytes() == flat(comm.rank, step - 1).tobytes()
            assert copies.held(left, step - 1).tobytes() == flat(left, step - 1).tobytes()
        comm.Barrier()
        copies.finish()
        # As the collective call of every step does.
        comm.Barrier()
        assert sorted(copies.own_steps) == sorted(copies.held_steps(left)) == sorted([max(step - 1, -1), step])
        assert copies.own(step).tobytes() == flat(comm.rank, step).tobytes()
        assert copies.held(left, step).tobytes() == flat(left, step).tobytes()
        comm.Barrier()
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    for other in others if not far else [left]:
        assert copies.held(other, step).tobytes() == flat(other, step).tobytes()
    for other in set(others) - {left} if far else ():
        assert copies.held_steps(other) == (-1, -1)


@both
def test_a_copy_now_and_then(comm, far):
    live, copies = make(comm, far, every=3)
    for step in range(8):
        update(live, comm.rank, step)
        copies.begin(step)
        copies.finish()
    comm.Barrier()
    left = kept_by(comm.rank, comm.size, 1)
    assert sorted(copies.own_steps) == sorted(copies.held_steps(left)) == [3, 6]


@both
def test_what_was_under_way_is_forgotten_with_the_channel(comm, far):
    live, copies = make(comm, far)
    copies.take(0)
    update(live, comm.rank, 1)
    copies.begin(1)
    copies.finish()
    copies.begin(2)
    duplicate = comm.Dup()
    copies.finish()
    connect(copies, duplicate, Waiter(60.0), far)
    copies.forget_after(1)
    assert sorted(copies.own_steps) == [-1, 1]
    copies.take(1)
    assert copies.own(1).tobytes() == flat(comm.rank, 1).tobytes()
    duplicate.Free()


@both
def test_damaged_versions_are_gone(comm, far):
    live, copies = make(comm, far)
    for step in (0, 1):
        update(live, comm.rank, step)
        copies.take(step)
    comm.Barrier()
    left = kept_by(comm.rank, comm.size, 1)
    assert copies.held_digests(left, 0) == [digest(part) for part in state_of(left, 0)]
    copies.whole()[0].view(np.uint32)[5] ^= 1 << 30
    comm.Barrier()
    assert (copies.own(0) is None, copies.own(1) is None) == (True, False)
    assert copies.own_steps == (-1, 1)
    # What is sent is another copy than the damaged one.
    if not far and copies.held_steps(left) != (-1, 1):
        assert copies.held(left, 0) is None
    assert copies.held(left, 1) is not None
    comm.Barrier()
    assert copies.held_steps(left) == ((0, 1) if far else (-1, 1))


@both
def test_a_copy_of_a_damaged_state_is_nowhere_used(comm, far):
    live, copies = make(comm, far)
    copies.take(0)
    update(live, comm.rank, 1)
    if comm.rank == 1:
        live[2].view(np.uint32)[123] ^= 1 << 30
    copies.take(1)
    comm.Barrier()
    left = kept_by(comm.rank, comm.size, 1)
    is_used = copies.held(left, 1) is not None
    comm.Barrier()
    assert is_used == (left != 1)
    assert (copies.own(1) is not None) == (comm.rank != 1)


@both
def test_without_digests_everything_is_used(comm, far):
    _, copies = make(comm, far, knows=False)
    copies.take(0)
    copies.whole()[0][0] += 1
    assert copies.own(0) is not None


def test_parts_travel_to_whoever_wants_them(comm):
    size, num = 1000, comm.size
    held = {role: [Entry("a", "weight", role * size, (role + 1) * size, 7)] for role in range(num)}
    # Everybody wants a stretch over the end of what its right neighbour holds; the last one wants all.
    wanted = {
        rank: [Entry("a", "weight", rank * size + 10, min((rank + 1) * size + 10, num * size), 0)]
        for rank in range(num)
    }
    wanted[num - 1].append(Entry("a", "weight", 0, num * size, 0))
    # What rank r held is with the rank before it.
    holders = {role: (role - 1) % num for role in range(num)}
    whole = np.arange(num * size, dtype=np.float32)
    sources = {
        role: Parts([np.zeros(7, np.float32), whole[role * size : (role + 1) * size]])
        for role, holder in holders.items()
        if holder == comm.rank
    }
    targets = [np.zeros(entry.stop - entry.start, np.float32) for entry in wanted[comm.rank]]
    channel = Channel(comm, Waiter(60.0), MODE)
    carry_out(plan_moves(held, wanted), holders, sources, targets, channel, comm.rank)
    for entry, target in zip(wanted[comm.rank], targets, strict=True):
        np.testing.assert_array_equal(target, whole[entry.start : entry.stop])
