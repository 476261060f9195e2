"""The ground under every other test over ranks: messages arrive, at odd sizes, on a communicator of their own."""

import numpy as np
import pytest
from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize("num_values", [0, 1, 7, 4097, 100_003])
def test_a_ring_passes_arrays_on(comm, num_values):
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sent = np.arange(num_values, dtype=np.float32) + comm.rank
    received = np.full(num_values, np.nan, dtype=np.float32)
    requests = [comm.Irecv(received, left, tag=3), comm.Isend(sent, right, tag=3)]
    MPI.Request.Waitall(requests)
    np.testing.assert_array_equal(received, np.arange(num_values, dtype=np.float32) + left)


def test_messages_of_one_tag_stay_in_order(comm):
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    requests = [comm.Isend(np.array([10 * comm.rank + i]), right, tag=i % 2) for i in range(6)]
    seen = []
    for tag in (1, 0):
        for _ in range(3):
            value = np.empty(1, dtype=np.int64)
            comm.Recv(value, left, tag=tag)
            seen.append(int(value[0]) - 10 * left)
    MPI.Request.Waitall(requests)
    assert seen == [1, 3, 5, 0, 2, 4]


def test_the_communicator_is_a_duplicate(comm):
    assert MPI.Comm.Compare(comm, MPI.COMM_WORLD) == MPI.CONGRUENT


@pytest.mark.mpi(min_size=3)
def test_a_split_by_parity_sums_its_own_ranks(comm):
    half = comm.Split(comm.rank % 2, comm.rank)
    total = np.empty(1, dtype=np.int64)
    half.Allreduce(np.array([comm.rank]), total)
    half.Free()
    assert total[0] == sum(range(comm.rank % 2, comm.size, 2))
