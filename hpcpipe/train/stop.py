"""Requests to stop: by a signal, by a file in the run directory, or because the allocation ends."""

import signal
import time
from collections import deque
from types import FrameType

from hpcpipe.cluster.slurm import AllocationEnd
from hpcpipe.errors import StoppedError
from hpcpipe.train.halt import HaltFile

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_RECENT_STEPS = 20
_MARGIN_S = 30.0


class StopRequest:
    """Whether somebody asked this process to stop.

    `hpcpipe launch` turns SIGTERM, Ctrl-C and a closed terminal into SIGUSR1, which reaches every rank; a signal to one
    rank is enough, since the ranks tell each other at the end of every step. Further signals change nothing. Rank 0
    also looks for a halt file, and at the time that is left of the allocation.

    Attributes
    ----------
    name : str
        Why to stop, in words: a signal's name, ``halt file: step 1200``, ``end of the Slurm allocation at 18:00:00``.
    kind : str
        ``signal``, ``halt`` or ``allocation``; empty if nobody asked.
    """

    def __init__(self) -> None:
        self.name = ""
        self.kind = ""
        self._halt: HaltFile | None = None
        self._end: AllocationEnd | None = None
        self._steps_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        for number in SIGNALS:
            # Under nohup Python found it ignored, whatever MPI has made of it since.
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._ask("signal", signal.Signals(number).name)

    def _ask(self, kind: str, name: str) -> None:
        if not self.name:
            self.kind, self.name = kind, name

    @property
    def is_set(self) -> bool:
        """Whether it is time to stop."""
        return bool(self.name)

    def watch(self, halt: HaltFile, end: AllocationEnd | None) -> None:
        """Look for a halt file and at the end of the allocation from now on, on rank 0."""
        self._halt, self._end = halt, end

    def look(self, step: int, step_s: float = 0.0, checkpoint_s: float = 0.0) -> None:
        """See whether the run should stop after a step; a few microseconds, mostly.

        Parameters
        ----------
        step : int
            The step that is about to run.
        step_s : float
            Seconds that the step before took; 0 if there was none.
        checkpoint_s : float
            Seconds from the end of a step until its checkpoint is complete.
        """
        self._steps_s.append(step_s)
        if self.name or self._halt is None:
            return
        words = self._halt.asks(step)
        if words:
            self._ask("halt", words)
        left_s = None if self._end is None else self._end.left_s()
        if left_s is not None and left_s < time_needed(max(self._steps_s), checkpoint_s):
            end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + left_s))
            self._ask("allocation", f"end of the Slurm allocation at {end}")

    def conclude(self) -> None:
        """Put the halt file away that was obeyed; to be called on rank 0 when the checkpoint is written."""
        if self._halt is not None and self.kind == "halt":
            self._halt.put_away()

    def error(self, when: str, advice: str) -> StoppedError:
        """Return what every rank raises to leave.

        Parameters
        ----------
        when : str
            Such as ``after step 7``.
        advice : str
            What the user should know besides.
        """
        error = StoppedError(f"asked to stop ({self.name or 'a signal on another rank'}) {when}{advice}")
        error.by = self.kind or "signal"
        return error.on_all()


def time_needed(step_s: float, checkpoint_s: float) -> float:
    """Return how many seconds before its end an allocation must be left, so that a last checkpoint is written.

    Parameters
    ----------
    step_s : float
        Seconds of the longest recent step: one runs to its end first, and may take twice as long.
    checkpoint_s : float
        Seconds of a checkpoint.
    """
    return 2 * step_s + 2 * checkpoint_s + _MARGIN_S
