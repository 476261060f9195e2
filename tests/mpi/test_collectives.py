"""Collectives: right values, the same bits on every rank, errors that all ranks raise, deadlines."""

import numpy as np
import pytest

from hpcpipe.errors import DamagedError, RankError, UsageError
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.collectives import (
    barrier,
    broadcast_bytes,
    gather_bytes,
    gather_bytes_at,
    gather_rows,
)
from hpcpipe.mpi.wait import Waiter

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture
def waiter():
    return Waiter(timeout_s=60.0)


def test_gather_rows_keeps_bits_and_order(comm, waiter):
    row = np.random.default_rng(comm.rank).normal(size=5)
    rows = gather_rows(comm, waiter, row)
    for rank in range(comm.size):
        assert rows[rank].tobytes() == np.random.default_rng(rank).normal(size=5).tobytes()


def test_bytes_of_any_length(comm, waiter):
    contents = gather_bytes(comm, waiter, b"x" * (comm.rank * 1000))
    assert [len(content) for content in contents] == [rank * 1000 for rank in range(comm.size)]
    root = comm.size - 1
    assert broadcast_bytes(comm, waiter, b"" if comm.rank == root else None, root) == b""
    assert broadcast_bytes(comm, waiter, b"abc" if comm.rank == root else None, root) == b"abc"


def test_an_error_of_one_rank_is_raised_by_all(comm, waiter):
    with pytest.raises(DamagedError, match="rank 1 says no") as caught, together(comm, waiter):
        if comm.rank == 1:
            raise DamagedError("rank 1 says no")
    assert caught.value.on_all_ranks


def test_an_error_may_name_a_file_whose_name_is_not_utf_8(comm, waiter):
    text = "\udcff and \ud800 in the name of a f\u00efle"
    with pytest.raises(DamagedError) as caught, together(comm, waiter):
        if comm.rank == 1:
            raise DamagedError(text)
    assert str(caught.value) == text


def test_the_lowest_failing_rank_is_heard(comm, waiter):
    with pytest.raises(UsageError, match="rank 0") as caught, together(comm, waiter):
        raise UsageError(f"rank {comm.rank}") if comm.rank != 1 else DamagedError("rank 1")
    assert caught.value.exit_code == UsageError.exit_code


def test_together_without_errors_returns(comm, waiter):
    with together(comm, waiter):
        value = comm.rank
    assert value == comm.rank


def test_a_silent_peer_is_given_up_after_the_deadline(comm):
    impatient = Waiter(timeout_s=0.2)
    if comm.rank == 0:
        with pytest.raises(RankError, match=r"waited 0.2 s for all \d+ ranks to meet"):
            barrier(comm, impatient)
        comm.Isend(np.zeros(1), 1, 9).Wait()
    elif comm.rank == 1:
        comm.Recv(np.empty(1), 0, 9)
    # The barrier that rank 0 gave up is completed by the others, so that none stays pending.
    if comm.rank != 0:
        barrier(comm, Waiter(60.0))


@pytest.mark.parametrize("length", [0, 1, 70_000])
def test_bytes_of_all_ranks_reach_one(comm, waiter, length):
    for root in (0, comm.size - 1):
        found = gather_bytes_at(comm, waiter, bytes([comm.rank]) * (length * comm.rank), root)
        expected = [bytes([rank]) * (length * rank) for rank in range(comm.size)] if comm.rank == root else []
        assert found == expected
