"""Point-to-point messages of the pipeline: receives posted ahead, sends that never block compute."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from hpcpipe.errors import UsageError
from hpcpipe.mpi.runtime import highest_tag
from hpcpipe.mpi.wait import Waiter
from hpcpipe.schedule.action import Action, Kind, Schedule

_DIRECTION = {Kind.SEND_F: 0, Kind.RECV_F: 0, Kind.SEND_B: 1, Kind.RECV_B: 1}


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


class Messages:
    """The messages of one rank while it walks a schedule.

    A tag is a function of direction, stage and microbatch, so a message can only meet the receive that was meant for
    it, in whatever order the ranks run.

    Parameters
    ----------
    comm : Comm
        The ranks of one pipeline, numbered as in the schedule.
    schedule : Schedule
        Gives the peers and the bounds of the tags.
    waiter : Waiter
        Waits, with its deadline.
    mode : MessageMode
        How to send.
    """

    def __init__(self, comm: MPI.Intracomm, schedule: Schedule, waiter: Waiter, mode: MessageMode) -> None:
        self._comm = comm
        self._schedule = schedule
        self._waiter = waiter
        self._mode = mode
        self._delays = random.Random(comm.rank)
        self._receives: dict[Action, MPI.Request] = {}
        self._sends: dict[Action, MPI.Request] = {}
        highest = 2 * schedule.num_stages * schedule.num_microbatches
        bound = highest_tag()
        if highest > bound:
            raise UsageError(
                f"{schedule.num_stages} stages x {schedule.num_microbatches} microbatches need message tags up to"
                f" {highest}, and this MPI allows {bound}: set parallel.microbatches lower"
            )

    def post_receive(self, action: Action, buffer: np.ndarray) -> None:
        """Post the receive of ``RECV_F`` or ``RECV_B`` into the caller's buffer, MPI's until it is waited for."""
        self._delay()
        source = self._schedule.stage_to_rank[action.stage + (-1 if action.kind is Kind.RECV_F else 1)]
        self._receives[action] = self._comm.Irecv(
            buffer, source, self._tag(action.kind, action.stage, action.microbatch)
        )

    def start_send(self, action: Action, buffer: np.ndarray) -> None:
        """Start the send of ``SEND_F`` or ``SEND_B`` from the caller's buffer, to be left alone until `sent`."""
        self._delay()
        receiver = action.stage + (1 if action.kind is Kind.SEND_F else -1)
        send = self._comm.Issend if self._mode.synchronous else self._comm.Isend
        tag = self._tag(action.kind, receiver, action.microbatch)
        self._sends[action] = send(buffer, self._schedule.stage_to_rank[receiver], tag)

    def wait_received(self, action: Action) -> None:
        """Wait until the message of a posted receive is in its buffer."""
        request = self._receives.pop(action)
        self._waiter.wait([request], lambda: f"the message of {action}")

    def wait_sent(self, action: Action) -> None:
        """Wait until the buffer of a started send may be used again."""
        request = self._sends.pop(action, None)
        if request is not None:
            self._waiter.wait([request], lambda: f"the receiver of {action}")

    def sent(self, action: Action) -> bool:
        """Return whether the buffer of a started send may be used again."""
        request = self._sends.get(action)
        if request is not None and not request.Test():
            return False
        self._sends.pop(action, None)
        return True

    def poll(self) -> None:
        """Let MPI move messages: it moves large ones only inside its own calls."""
        pending = [request for requests in (self._receives, self._sends) for request in requests.values() if request]
        if pending:
            MPI.Request.Testany(pending)

    def _tag(self, kind: Kind, receiver: int, microbatch: int) -> int:
        return (receiver * self._schedule.num_microbatches + microbatch) * 2 + _DIRECTION[kind]

    def _delay(self) -> None:
        if self._mode.max_delay_s > 0:
            time.sleep(self._delays.uniform(0, self._mode.max_delay_s))


Poll = Callable[[], None]
