"""From the actions of a schedule to messages: who the peer is, and which tag makes the two ends meet."""

import numpy as np

from hpcpipe.errors import UsageError
from hpcpipe.faults import hooks
from hpcpipe.mpi.channel import Channel
from hpcpipe.mpi.runtime import highest_tag
from hpcpipe.schedule.action import Action, Kind, Schedule

_DIRECTION = {Kind.SEND_F: 0, Kind.RECV_F: 0, Kind.SEND_B: 1, Kind.RECV_B: 1}


class Messages:
    """The messages of one rank while it walks a schedule.

    A tag is a function of direction, receiving stage and microbatch, so a message can only meet the receive that was
    meant for it, in whatever order the ranks run.

    Parameters
    ----------
    channel : Channel
        Between the ranks of one pipeline, numbered as in the schedule.
    schedule : Schedule
        Gives the peers and the bounds of the tags.
    """

    def __init__(self, channel: Channel, schedule: Schedule) -> None:
        self._channel = channel
        self._schedule = schedule
        self.poll = channel.poll
        self.wait = channel.wait
        self.is_complete = channel.is_complete
        needed, bound = 2 * schedule.num_stages * schedule.num_microbatches, highest_tag()
        if needed > bound:
            raise UsageError(
                f"{schedule.num_stages} stages x {schedule.num_microbatches} microbatches need message tags up to"
                f" {needed}, and this MPI allows {bound}: set parallel.microbatches lower"
            )

    def post_receive(self, action: Action, buffer: np.ndarray) -> None:
        """Post the receive of ``RECV_F`` or ``RECV_B`` into the caller's buffer, MPI's until `wait` returns."""
        sender = action.stage + (-1 if action.kind is Kind.RECV_F else 1)
        source = self._schedule.stage_to_rank[sender]
        tag = self._tag(action.kind, action.stage, action.microbatch)
        self._channel.post_receive(action, buffer, source, hooks.receive_tag(tag, action.microbatch))

    def start_send(self, action: Action, buffer: np.ndarray) -> None:
        """Start the send of ``SEND_F`` or ``SEND_B`` from the caller's buffer, left alone until `wait` returns."""
        receiver = action.stage + (1 if action.kind is Kind.SEND_F else -1)
        destination = self._schedule.stage_to_rank[receiver]
        self._channel.start_send(action, buffer, destination, self._tag(action.kind, receiver, action.microbatch))

    def _tag(self, kind: Kind, receiver: int, microbatch: int) -> int:
        return (receiver * self._schedule.num_microbatches + microbatch) * 2 + _DIRECTION[kind]
