"""The communicators that make messages hard for the other tests do so, also below grids and channels."""

import time

import numpy as np
import pytest
from mpi4py import MPI
from support.hard_messages import HardComm, harden

from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import barrier
from hpcpipe.mpi.grid import make_grid
from hpcpipe.mpi.wait import Waiter

pytestmark = pytest.mark.mpi(min_size=2)


def test_sends_of_a_grid_wait_for_their_receive(comm):
    grid = make_grid(harden(comm, MessageMode(synchronous=True)), comm.size, 1)
    waiter = Waiter(60.0)
    channel = Channel(grid.pipeline_comm, waiter, MessageMode())
    if comm.rank == 0:
        channel.start_send("value", np.ones(1), 1, 5)
        assert not any(channel.is_complete("value") for _ in range(100))
    barrier(comm, waiter)
    if comm.rank == 1:
        channel.post_receive("value", np.empty(1), 0, 5)
    if comm.rank < 2:
        channel.wait("value")
    grid.free()


def test_every_call_is_delayed(comm, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hard = harden(MPI.COMM_SELF, MessageMode(max_delay_s=0.05))
    buffer = np.zeros(1)
    requests = [
        hard.Irecv(buffer, 0, 1),
        hard.Isend(np.ones(1), 0, 1),
        hard.Ibarrier(),
        hard.Ibcast(buffer.copy(), 0),
        hard.Iallgather(np.ones(1), np.empty(1)),
    ]
    MPI.Request.Waitall(requests)
    assert buffer[0] == 1
    assert len(slept) == len(requests) and 0 <= min(slept) < max(slept) <= 0.05


def test_messages_are_left_alone_without_a_mode(comm):
    assert harden(MPI.COMM_SELF, MessageMode()) is MPI.COMM_SELF
    duplicate = harden(MPI.COMM_SELF, MessageMode(synchronous=True)).Dup()
    assert isinstance(duplicate, HardComm) and duplicate.mode.synchronous
    duplicate.Free()
