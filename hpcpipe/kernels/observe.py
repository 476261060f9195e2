"""Watching kernels at work: how often each is called, what it has to do, and how long it takes.

Only benchmarks do this. Nothing here is in the way of a step that nobody watches.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba.core.registry import CPUDispatcher

from hpcpipe.kernels.threads import GRAIN, Team
from hpcpipe.kernels.work import NOTHING, Work, work_of

# Numba has no types for its dispatchers.
_Dispatcher: Any = CPUDispatcher
_WAITING = "exchange"


@dataclass
class Tally:
    """The calls of one kernel.

    Attributes
    ----------
    calls : int
        How many; what a team's threads share is one call.
    seconds : float
        Wall time of the thread that called.
    work : Work
        What they had to do; nothing where the kernel is not known.
    """

    calls: int = 0
    seconds: float = 0.0
    work: Work = NOTHING

    def add(self, calls: int, seconds: float, work: Work | None) -> None:
        """Add calls."""
        self.calls += calls
        self.seconds += seconds
        self.work = self.work.plus(work or NOTHING)


@dataclass
class Observer:
    """Counts the calls of kernels, by name, while `watch` is active.

    Attributes
    ----------
    kernels : dict of str to Tally
        In the order of their first calls.
    """

    kernels: dict[str, Tally] = field(default_factory=dict)
    _is_watching: bool = False
    # The calls within a function that a team runs; None outside of one.
    _inside: list[tuple[str, float, Work | None]] | None = None
    _is_counted: bool = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count the calls of all kernels of this process.

        Raises
        ------
        AssertionError
            If another observer is watching.
        """
        assert "__call__" not in vars(_Dispatcher)
        call = _Dispatcher.__call__
        main = threading.get_ident()

        def counted(function: Any, *arguments: Any) -> Any:
            if self._is_counted or function.__name__ == _WAITING:
                return call(function, *arguments)
            start = time.perf_counter()
            result = call(function, *arguments)
            seconds = time.perf_counter() - start
            work = work_of(function.__name__, arguments)
            if self._inside is not None:
                self._inside.append((function.__name__, seconds, work))
            elif threading.get_ident() == main:
                self._tally(function.__name__).add(1, seconds, work)
            return result

        _Dispatcher.__call__ = counted
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False
            del _Dispatcher.__call__

    def run(self, run: Callable[[], None], function: Callable[..., object], arguments: Sequence[Any]) -> None:
        """Count what a team runs; it takes as long as its last thread.

        Parameters
        ----------
        run : callable
            Lets the team do it.
        function : callable
            A kernel, or a function that calls kernels.
        arguments : sequence
            Those of the whole.
        """
        if not self._is_watching:
            run()
            return
        is_kernel = isinstance(function, _Dispatcher)
        self._is_counted, self._inside = is_kernel, None if is_kernel else []
        start = time.perf_counter()
        try:
            run()
        finally:
            seconds = time.perf_counter() - start
            parts, self._is_counted, self._inside = self._inside, False, None
        if is_kernel:
            self._tally(function.__name__).add(1, seconds, work_of(function.__name__, arguments))
        elif parts:
            self._share_out(parts, seconds)

    def _share_out(self, parts: list[tuple[str, float, Work | None]], seconds: float) -> None:
        """Give kernels that threads called their shares of the time that all took together."""
        taken = sum(part_s for _, part_s, _ in parts)
        for name in dict.fromkeys(name for name, _, _ in parts):
            own = [(part_s, work or NOTHING) for other, part_s, work in parts if other == name]
            work = Work(*(sum(values) for values in zip(*(work for _, work in own), strict=True)))
            self._tally(name).add(1, seconds * sum(part_s for part_s, _ in own) / taken, work)

    def _tally(self, name: str) -> Tally:
        return self.kernels.setdefault(name, Tally())


class ObservedTeam(Team):
    """A team whose work an observer counts.

    Parameters
    ----------
    observer : Observer
        Counts, while it watches.
    num_threads, cores
        As for `Team`.
    """

    def __init__(self, observer: Observer, num_threads: int, cores: Sequence[Collection[int]] = ()) -> None:
        super().__init__(num_threads, cores)
        self._observer = observer

    def run(
        self,
        function: Callable[..., object],
        length: int,
        *arguments: Any,
        private: Sequence[Any] | np.ndarray | None = None,
        grain: int = GRAIN,
    ) -> None:
        """Do what `Team.run` does, counted."""
        do = super().run
        self._observer.run(lambda: do(function, length, *arguments, private=private, grain=grain), function, arguments)
