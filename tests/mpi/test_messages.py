"""Messages of the pipeline: matched by tag in any order, synchronous sends and delays without deadlock."""

import numpy as np
import pytest

from hpcpipe.errors import UsageError
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.wait import Waiter
from hpcpipe.pipeline.messages import Messages
from hpcpipe.schedule.action import Action, Kind
from hpcpipe.schedule.build import build

pytestmark = pytest.mark.mpi(min_size=2)


def value_of(kind, stage, microbatch):
    return 1000.0 * (kind is Kind.SEND_F) + 100 * stage + microbatch


@pytest.mark.parametrize("mode", [MessageMode(), MessageMode(synchronous=True), MessageMode(True, 0.003)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "forward"])
@pytest.mark.parametrize("size", [1, 5000])
def test_every_message_reaches_the_receive_that_was_meant(comm, mode, name, size):
    schedule = build(name, comm.size, comm.size + 1)
    messages = Messages(Channel(comm, Waiter(60.0), mode), schedule)
    received = {}
    for action in schedule.actions[comm.rank]:
        key = (action.stage, action.microbatch)
        if action.kind in (Kind.RECV_F, Kind.RECV_B):
            received[action] = np.full(size, np.nan, np.float32)
            messages.post_receive(action, received[action])
        elif action.kind in (Kind.SEND_F, Kind.SEND_B):
            messages.start_send(action, np.full(size, value_of(action.kind, *key), np.float32))
        elif action.kind is Kind.F and schedule.input_crosses(action.stage):
            receive = Action(Kind.RECV_F, *key)
            messages.wait(receive)
            assert (received[receive] == value_of(Kind.SEND_F, key[0] - 1, key[1])).all()
        elif action.kind is Kind.B and schedule.output_crosses(action.stage):
            receive = Action(Kind.RECV_B, *key)
            messages.wait(receive)
            assert (received[receive] == value_of(Kind.SEND_B, key[0] + 1, key[1])).all()
        messages.poll()
    for action in schedule.actions[comm.rank]:
        if action.kind in (Kind.SEND_F, Kind.SEND_B):
            messages.wait(action)
            assert messages.is_complete(action)


def test_a_synchronous_send_waits_for_its_receive(comm):
    schedule = build("forward", comm.size, 1)
    messages = Messages(Channel(comm, Waiter(60.0), MessageMode(synchronous=True)), schedule)
    if comm.rank == 0:
        send = Action(Kind.SEND_F, 0, 0)
        messages.start_send(send, np.ones(1, np.float32))
        assert not any(messages.is_complete(send) for _ in range(100))
        comm.Isend(np.zeros(1), 1, 10_000).Wait()
        messages.wait(send)
    elif comm.rank == 1:
        comm.Recv(np.empty(1), 0, 10_000)
        buffer = np.empty(1, np.float32)
        messages.post_receive(Action(Kind.RECV_F, 1, 0), buffer)
        messages.wait(Action(Kind.RECV_F, 1, 0))
        assert buffer[0] == 1


def test_modes_are_read_from_text():
    assert MessageMode.parse("") == MessageMode()
    assert MessageMode.parse("synchronous,delay=0.05") == MessageMode(True, 0.05)
    for text in ("sync", "delay", "delay=x", "synchronous=1"):
        with pytest.raises(UsageError, match="neither 'synchronous' nor 'delay=SECONDS'"):
            MessageMode.parse(text)
