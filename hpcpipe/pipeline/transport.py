"""How an executor's messages travel, whatever carries them."""

from typing import Protocol

import numpy as np

from hpcpipe.schedule.action import Action


class Transport(Protocol):
    """Carries the messages of one rank; actions name them."""

    def post_receive(self, action: Action, buffer: np.ndarray) -> None:
        """Post the receive of ``RECV_F`` or ``RECV_B`` into a buffer."""
        ...

    def start_send(self, action: Action, buffer: np.ndarray) -> None:
        """Start the send of ``SEND_F`` or ``SEND_B`` from a buffer."""
        ...

    def wait(self, action: Action) -> None:
        """Wait until a posted receive or a started send is complete."""
        ...

    def is_complete(self, action: Action) -> bool:
        """Return whether `wait` would return at once."""
        ...

    def poll(self) -> None:
        """Let messages move."""
        ...


class NoTransport:
    """The transport of a pipeline on one rank, which has no messages."""

    def post_receive(self, action: Action, buffer: np.ndarray) -> None:
        """Refuse: there is no other rank."""
        raise AssertionError(f"{action} in a pipeline of one rank")

    def start_send(self, action: Action, buffer: np.ndarray) -> None:
        """Refuse: there is no other rank."""
        raise AssertionError(f"{action} in a pipeline of one rank")

    def wait(self, action: Action) -> None:
        """Refuse: there is no other rank."""
        raise AssertionError(f"{action} in a pipeline of one rank")

    def is_complete(self, action: Action) -> bool:
        """Refuse: there is no other rank."""
        raise AssertionError(f"{action} in a pipeline of one rank")

    def poll(self) -> None:
        """Do nothing."""
