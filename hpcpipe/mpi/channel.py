"""Point-to-point messages: receives posted ahead, sends that never block compute, each under a name of its own."""

import random
import time
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from hpcpipe.errors import UsageError
from hpcpipe.faults import hooks
from hpcpipe.mpi.runtime import process_numbers
from hpcpipe.mpi.tally import Tally
from hpcpipe.mpi.wait import Other, Waiter


@dataclass(frozen=True)
class MessageMode:
    """How messages are sent: as in production, or in the way that finds deadlocks and races.

    Attributes
    ----------
    synchronous : bool
        Sends complete only when the receiver has posted its receive, however small they are.
    max_delay_s : float
        Sleep a random time up to this before every send and receive.
    """

    synchronous: bool = False
    max_delay_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "MessageMode":
        """Read ``synchronous,delay=0.05`` (both parts optional).

        Raises
        ------
        UsageError
            If a part is neither.
        """
        synchronous, max_delay_s = False, 0.0
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name == "synchronous" and not value:
                synchronous = True
            elif name == "delay" and value.replace(".", "", 1).isdigit():
                max_delay_s = float(value)
            else:
                raise UsageError(f"message mode '{text}': '{part}' is neither 'synchronous' nor 'delay=SECONDS'")
        return cls(synchronous, max_delay_s)


class Channel:
    """The messages under way between this rank and others.

    Parameters
    ----------
    comm : Comm
        The ranks that talk.
    waiter : Waiter
        Waits, with its deadline.
    mode : MessageMode
        How to send.
    tally : Tally, optional
        Counts the content of the messages.
    kind : str
        What they are called by faults that are injected into what has arrived; empty: they are left alone.
    """

    def __init__(
        self, comm: MPI.Intracomm, waiter: Waiter, mode: MessageMode, tally: Tally | None = None, kind: str = ""
    ) -> None:
        self._comm = comm
        self._waiter = waiter
        self._mode = mode
        self._delays = random.Random(comm.rank)
        self._processes = process_numbers(comm)
        self._pending: dict[Hashable, tuple[MPI.Request, Other]] = {}
        self._tally, self._kind = tally, kind
        self._arriving: dict[Hashable, tuple[int, np.ndarray]] = {}

    def post_receive(self, name: Hashable, buffer: np.ndarray, source: int, tag: int) -> None:
        """Post a receive into the caller's buffer, which is MPI's until `wait` for the name returns."""
        self._delay()
        self._arriving[name] = source, buffer
        other = Other("RECV", name, self._processes[source], tag)
        self._pending[name] = self._comm.Irecv(buffer, source, tag), other
        self._waiter.watch.posted(*other, buffer.nbytes)

    def start_send(self, name: Hashable, buffer: np.ndarray, destination: int, tag: int) -> None:
        """Start a send from the caller's buffer, to be left alone until `wait` for the name returns."""
        self._delay()
        if self._tally is not None:
            self._tally.add_sent(destination, buffer)
        send = self._comm.Issend if self._mode.synchronous else self._comm.Isend
        other = Other("SEND", name, self._processes[destination], tag)
        self._pending[name] = send(buffer, destination, tag), other
        self._waiter.watch.posted(*other, buffer.nbytes)

    def wait(self, name: Hashable) -> None:
        """Wait until a posted receive or a started send is complete; one that is known to be returns at once."""
        request, other = self._pending.pop(name, (None, None))
        if request is not None and other is not None:
            self._waiter.wait([request], lambda: f"the other end of message {name}", other)
            self._arrived(name)

    def is_complete(self, name: Hashable) -> bool:
        """Return whether `wait` would return at once."""
        request = self._pending.get(name, (None,))[0]
        if request is not None and not request.Test():
            return False
        if self._pending.pop(name, None) is not None:
            self._arrived(name)
        return True

    def poll(self) -> None:
        """Let MPI move messages: it moves large ones only inside its own calls."""
        pending = [request for request, _ in self._pending.values() if request]
        if pending:
            MPI.Request.Testany(pending)

    def _arrived(self, name: Hashable) -> None:
        """Count a message, if it is one that was received."""
        if name not in self._arriving:
            return
        source, buffer = self._arriving.pop(name)
        if self._kind:
            hooks.corrupt(self._kind, [buffer], getattr(name, "microbatch", None))
        if self._tally is not None:
            self._tally.add_received(source, buffer)

    def _delay(self) -> None:
        if self._mode.max_delay_s > 0:
            time.sleep(self._delays.uniform(0, self._mode.max_delay_s))
