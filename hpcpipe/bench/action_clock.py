"""What each compute action of a rank takes, and what the rank waits meanwhile, in wall time."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from hpcpipe.mpi.wait import Waiter
from hpcpipe.pipeline.stage import Stage

_ACTIONS = ("forward", "backward", "backward_input", "backward_weight")


class ActionClock:
    """Times the compute actions of an executor, from the end of one to the end of the next.

    So whatever a rank does between two actions, such as starting messages, counts with the second. Waiting does not.

    Parameters
    ----------
    stages : mapping of int to Stage
        What the executor runs; their functions are replaced by timed ones.
    waiter : Waiter
        Counts what is waited; it starts at zero in each step.

    Attributes
    ----------
    actions_s : list of float
        Seconds of each compute action since `start`, in the order of the rank's list.
    waited_s : float
        Seconds that were waited before the last of them ended.
    """

    def __init__(self, stages: Mapping[int, Stage], waiter: Waiter) -> None:
        self.actions_s: list[float] = []
        self.waited_s = 0.0
        self._waiter = waiter
        self._last_s = 0.0
        for stage in stages.values():
            for name in _ACTIONS:
                setattr(stage, name, self._timed(getattr(stage, name)))

    def start(self) -> None:
        """Begin a step."""
        self.actions_s, self.waited_s = [], 0.0
        self._last_s = time.perf_counter()

    def _timed(self, function: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            function(*arguments)
            now, waited_s = time.perf_counter(), self._waiter.waited_s
            self.actions_s.append(now - self._last_s - (waited_s - self.waited_s))
            self._last_s, self.waited_s = now, waited_s

        return run
