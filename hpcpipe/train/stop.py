"""Requests to stop: a signal sets a flag, the loop looks at it between steps."""

import signal
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether somebody asked this process to stop.

    `hpcpipe launch` turns SIGTERM and Ctrl-C into SIGUSR1, which reaches every rank; a signal to one rank is enough,
    since the ranks tell each other at the end of every step. Further signals change nothing.
    """

    def __init__(self) -> None:
        self.name = ""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        """Whether a signal came."""
        return bool(self.name)
