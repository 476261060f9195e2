"""Communicators whose messages are late and whose sends wait for their receive, for every test over ranks."""

import os
import random
import time
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from hpcpipe.mpi.channel import MessageMode
from hpcpipe.train.setup import MESSAGES

MODE = MessageMode.parse(os.environ.get(MESSAGES, ""))
"""What the environment asks for; tests that set a mode of their own get it as well."""


def _late(name: str, synchronous: str | None = None) -> Callable[..., Any]:
    """Return the communicator's method of a name, or the synchronous one in its stead, behind a random delay."""

    def method(self: "HardComm", *args: Any, **kwargs: Any) -> Any:
        if self.mode.max_delay_s > 0:
            time.sleep(self.delays.uniform(0, self.mode.max_delay_s))
        chosen = synchronous if synchronous and self.mode.synchronous else name
        return getattr(super(HardComm, self), chosen)(*args, **kwargs)

    return method


class HardComm(MPI.Intracomm):
    """A communicator on which every message is made hard, those of collectives included, as on its descendants.

    Channels, collectives and grids that are made from it need to know nothing of it.
    """

    mode = MODE
    delays = random.Random()

    Isend = _late("Isend", "Issend")
    Send = _late("Send", "Ssend")
    Irecv = _late("Irecv")
    Recv = _late("Recv")
    Ibarrier = _late("Ibarrier")
    Ibcast = _late("Ibcast")
    Iallgather = _late("Iallgather")

    def Split(self, *args: Any, **kwargs: Any) -> MPI.Intracomm:
        return type(self)(super().Split(*args, **kwargs))


def harden(comm: MPI.Intracomm, mode: MessageMode = MODE) -> MPI.Intracomm:
    """Return the same communicator, hard if the mode says so."""
    if mode == MessageMode():
        return comm
    kind = type("HardComm", (HardComm,), {"mode": mode, "delays": random.Random(comm.rank)})
    return kind(comm)


def fewer_steps(steps: int) -> int:
    """Return how many steps to train: at most two where every message is late, since a step then takes seconds."""
    return min(steps, 2) if MODE.max_delay_s else steps
