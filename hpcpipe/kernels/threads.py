"""Threads of one rank that compute parts of one output together."""

import os
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from hpcpipe.errors import UsageError
from hpcpipe.kernels import spin

GRAIN = 32
"""Rows of a block of a product: where an output is cut."""

Part = tuple[int, int]
"""First row, and the row behind the last."""

# About 0.1 ms: longer than the interpreter takes from one kernel to the next, shorter than waiting for a message.
_TURNS = 3000
# Two lines of the cache, since processors fetch them in pairs; in words of 8 bytes.
_APART = 16


@cache
def cut(length: int, num_parts: int, grain: int = GRAIN) -> tuple[Part, ...]:
    """Cut rows into contiguous parts of nearly the same length.

    Parameters
    ----------
    length : int
        Rows, at least 0.
    num_parts : int
        Most parts, at least 1.
    grain : int
        Cuts are multiples of this.

    Returns
    -------
    tuple of (int, int)
        First row and the row behind the last of each part, in ascending order, none of them empty: as many as
        `num_parts`, or fewer where there are not enough rows.
    """
    num_grains = -(-length // grain)
    num_parts = min(num_parts, num_grains)
    cuts = [part * num_grains // num_parts * grain for part in range(num_parts)]
    return tuple(pairwise([*cuts, length]))


class Team:
    """A rank's threads: the caller's, which takes the first part of all work, and others that wait for theirs.

    They are started by the first `run` that needs them, and anew in a process that was forked. One thread uses a team,
    always the same; a function that it runs must not use it.

    Parameters
    ----------
    num_threads : int
        The caller's included, at least 1.
    cores : sequence of collection of int
        Processors of each core that no other rank computes on. If they are as many as threads, each thread is pinned
        to its own share of them, and waits a moment for the next kernel before it sleeps. Else the system places them.
    """

    def __init__(self, num_threads: int, cores: Sequence[Collection[int]] = ()) -> None:
        self.num_threads = num_threads
        self._cores = cores if len(cores) >= num_threads > 1 else ()
        self._turns = _TURNS if self._cores and spin.is_possible() else 0
        self._workers: list[_Worker] = []
        self._mask_before: set[int] = set()
        self._pid = 0

    @property
    def is_pinned(self) -> bool:
        """Whether each thread has cores of its own."""
        return bool(self._cores)

    def prepare(self) -> None:
        """Load or compile what threads wait with, so that no step waits for that."""
        if self._turns:
            words = np.zeros(2, np.int64)
            spin.exchange(words.ctypes.data, 0, words[1:].ctypes.data, 1, 0)

    def run(
        self,
        function: Callable[..., object],
        length: int,
        *arguments: Any,
        private: Sequence[Any] | np.ndarray | None = None,
        grain: int = GRAIN,
    ) -> None:
        """Call a function for parts of an output, one for each thread, and return when all calls have.

        The call is ``function(*arguments, first, last)``, or ``function(*arguments, private[thread], first, last)``.
        With one thread, or one part, it is a plain call.

        Parameters
        ----------
        function : callable
            It gains from threads as far as it releases the interpreter's lock, as kernels do. It must write nothing
            that two parts share, so that the number of threads changes no bits.
        length : int
            Rows, columns or whatever the output is cut by; nothing is called for 0.
        *arguments
            What every part gets. The threads keep no reference to it.
        private : sequence or array, optional
            What only one thread gets: scratch of its own.
        grain : int
            Parts start at multiples of this.

        Raises
        ------
        Exception
            What the function raised, for the first part if it did so for several. All calls have ended by then.
        UsageError
            If the system does not start so many threads.
        """
        parts = cut(length, self.num_threads, grain)
        if private is None:
            calls = [(*arguments, *part) for part in parts]
        else:
            calls = [(*arguments, private[thread], *part) for thread, part in enumerate(parts)]
        if len(calls) > 1:
            self._run_together(function, calls)
        elif calls:
            function(*calls[0])

    def _run_together(self, function: Callable[..., object], calls: Sequence[tuple[Any, ...]]) -> None:
        """Make at least two calls, each on a thread."""
        if self._pid != os.getpid():
            self._start()
        workers = self._workers[: len(calls) - 1]
        for worker, call in zip(workers, calls[1:], strict=True):
            worker.ask(function, call)
        errors: list[BaseException] = []
        try:
            function(*calls[0])
        except BaseException as error:
            errors.append(error)
        for worker in workers:
            errors += worker.wait()
        if errors:
            try:
                raise errors[0]
            finally:
                # Its traceback has this frame, which must not have it in turn and keep the arguments alive.
                errors.clear()

    def close(self) -> None:
        """End the threads, and let the caller's run where it could before."""
        if self._pid != os.getpid():
            return
        for worker in self._workers:
            worker.stop()
        if self._mask_before:
            os.sched_setaffinity(0, self._mask_before)
        self._workers, self._pid, self._mask_before = [], 0, set()

    def _start(self) -> None:
        """Start the threads of this process, and pin them."""
        shares = _shares(self._cores, self.num_threads)
        words = np.zeros(2 * _APART * self.num_threads, np.int64)
        workers = [
            _Worker(index, shares[index], words[2 * _APART * index :], self._turns)
            for index in range(1, self.num_threads)
        ]
        for index, worker in enumerate(workers, start=1):
            try:
                worker.thread.start()
            except RuntimeError as error:
                for started in workers[: index - 1]:
                    started.stop()
                raise UsageError(
                    f"parallel.threads = {self.num_threads}: the system started no more than {index} threads ({error}):"
                    f" set parallel.threads = {index} or less, or raise the limit of processes (ulimit -u)"
                ) from error
        if self._cores:
            self._mask_before = os.sched_getaffinity(0)
            _pin(shares[0])
        self._workers, self._pid = workers, os.getpid()


ALONE = Team(1)
"""The caller's thread only."""


class _Worker:
    """A thread that waits for calls to make.

    The two locks carry every call and its answer. The two words only tell a thread that is not asleep yet that waiting
    for its lock will be short.

    Parameters
    ----------
    index : int
        Its number in the team; the caller is 0.
    processors : collection of int
        Where it runs; anywhere if there are none.
    words : int64 array, more than ``_APART`` long
        How many calls were asked for, and at ``_APART`` how many were answered.
    turns : int
        How often to look at the words before sleeping.
    """

    def __init__(self, index: int, processors: Collection[int], words: Any, turns: int) -> None:
        self.thread = threading.Thread(target=self._serve, name=f"hpcpipe {index}", daemon=True)
        self._processors = processors
        self._words = words
        self._asked_at, self._answered_at = words.ctypes.data, words[_APART:].ctypes.data
        self._turns = turns
        self._asked, self._answered = threading.Lock(), threading.Lock()
        self._asked.acquire()
        self._answered.acquire()
        self._num_asked = self._num_answered = 0
        self._call: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        self._errors: list[BaseException] = []

    def ask(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        """Let the thread make a call."""
        self._call = function, arguments
        self._num_asked += 1
        self._asked.release()
        if self._turns:
            self._words[0] = self._num_asked

    def wait(self) -> list[BaseException]:
        """Return once the call has ended, with what it raised.

        A handler of a signal may raise here. The call goes on all the same, in buffers of the caller, so that such an
        exception too is returned only when it has ended.
        """
        errors: list[BaseException] = []
        while True:
            try:
                if self._turns:
                    # Writing the same number again lets the one kernel serve both sides.
                    spin.exchange(self._asked_at, self._num_asked, self._answered_at, self._num_asked, self._turns)
                self._answered.acquire()
            except BaseException as error:
                errors.append(error)
            if self._num_answered == self._num_asked:
                break
        errors += self._errors
        self._errors.clear()
        return errors

    def stop(self) -> None:
        """End the thread, which must be idle."""
        self._asked.release()
        self.thread.join()

    def _serve(self) -> None:
        """Make calls until there is none to make."""
        if self._processors:
            _pin(self._processors)
        while True:
            self._asked.acquire()
            if self._call is None:
                return
            self._make_call()
            self._num_answered += 1
            # It is free already where a signal kept the caller from taking it after the last call.
            if self._answered.locked():
                self._answered.release()
            if self._turns:
                # The word is written without the interpreter's lock, so that the caller finds that free too.
                answered = self._num_answered
                spin.exchange(self._answered_at, answered, self._asked_at, answered + 1, self._turns)

    def _make_call(self) -> None:
        """Make the call and keep what it raised; no name here outlives it."""
        assert self._call is not None
        (function, arguments), self._call = self._call, None
        try:
            function(*arguments)
        except BaseException as error:
            self._errors.append(error)


def _shares(cores: Sequence[Collection[int]], num_threads: int) -> list[Collection[int]]:
    """Deal the cores out in order; nothing to anyone if there are none."""
    cuts = [thread * len(cores) // num_threads for thread in range(num_threads + 1)]
    return [set().union(*cores[start:stop]) for start, stop in pairwise(cuts)]


def _pin(processors: Collection[int]) -> None:
    """Keep the calling thread on some processors; where the system does not allow it, it is only slower."""
    with suppress(OSError):
        os.sched_setaffinity(0, processors)
