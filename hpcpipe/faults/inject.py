"""Lets the faults of one process happen when their conditions hold."""

import collections
import itertools
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

import numpy as np

from hpcpipe.faults.parse import Fault

UNUSED_TAG = 32_766
"""A tag that no message has, and that every MPI library allows."""

_EXPONENT_BITS = {np.dtype("f8"): (52, 63), np.dtype("f4"): (23, 31), np.dtype("f2"): (10, 15), np.dtype("u2"): (7, 15)}
"""First exponent bit, and the one behind the last; bfloat16 is kept in unsigned words of 16 bits."""


class InjectedError(Exception):
    """What a defect in a user's code would raise."""


class Injector:
    """The faults that may happen in this process.

    Parameters
    ----------
    faults : sequence of Fault
        Those of other processes are left out here.
    process : int
        Number of this process in the first world communicator.
    """

    def __init__(self, faults: Sequence[Fault], process: int) -> None:
        self._faults = [fault for fault in faults if fault.process in (None, process)]
        self._left = {id(fault): fault.times for fault in self._faults}
        self._numbers = {id(fault): random.Random(f"{fault.text} {process}") for fault in self._faults}
        self._start_s = time.monotonic()
        self._cpu_s = time.thread_time()
        self.step: int | None = None
        self.rank: int | None = None
        for fault in self._faults:
            if fault.is_timed:
                self._arm(fault)

    def point(self, phase: str, microbatch: int | None = None) -> None:
        """Let the faults of a phase happen, if there are any; it may never return.

        Parameters
        ----------
        phase : str
            One of `hpcpipe.faults.parse.PHASES`.
        microbatch : int, optional
            Index of the microbatch that the process works on.

        Raises
        ------
        InjectedError, MemoryError, SystemExit
            The fault itself.
        """
        for fault in self._faults:
            has_place = fault.data is not None or fault.kind == "wrongtag" or fault.is_timed
            if not has_place and fault.phase in (None, phase) and self._fires(fault, microbatch):
                self._happen(fault)
        self._cpu_s = time.thread_time()

    def corrupt(self, data: str, arrays: Iterable[np.ndarray], microbatch: int | None = None) -> None:
        """Damage one element of some arrays in place, if a fault says so.

        Parameters
        ----------
        data : str
            What it is, one of `hpcpipe.faults.parse.DATA`.
        arrays : iterable of ndarray
            Numbers of any shape, the caller's; bfloat16 as unsigned words of 16 bits.
        microbatch : int, optional
            Index of the microbatch that it belongs to.
        """
        for fault in self._faults:
            if fault.data == data and self._fires(fault, microbatch):
                _damage(fault, [array for array in arrays if array.size])

    def tag(self, tag: int, microbatch: int | None = None) -> int:
        """Return the tag to post a receive with: the one it is given, or a wrong one."""
        for fault in self._faults:
            if fault.kind == "wrongtag" and self._fires(fault, microbatch):
                return UNUSED_TAG
        return tag

    def _fires(self, fault: Fault, microbatch: int | None) -> bool:
        """Tell whether all conditions but the place hold, and count it."""
        if self._left[id(fault)] < 1:
            return False
        if not fault.is_in(self.step):
            return False
        if fault.rank not in (None, self.rank) or fault.microbatch not in (None, microbatch):
            return False
        if fault.after_s is not None and time.monotonic() - self._start_s < fault.after_s:
            return False
        if fault.probability < 1.0 and self._numbers[id(fault)].random() >= fault.probability:
            return False
        self._left[id(fault)] -= 1
        return True

    def _arm(self, fault: Fault) -> None:
        """Let a signal come at its moment."""
        assert fault.after_s is not None
        timer = threading.Timer(fault.after_s, self._happen, (fault,))
        timer.daemon = True
        timer.start()

    def _happen(self, fault: Fault) -> None:
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "stop":
            _stop(fault.seconds)
        elif fault.kind == "spin":
            _spin()
        elif fault.kind == "slow":
            # Time on a core counts, not time in which the process waits for others that wait for it.
            time.sleep((max(fault.factor, 1.0) - 1.0) * (time.thread_time() - self._cpu_s))
        elif fault.kind == "raise":
            raise InjectedError(f"injected: {fault.text}")
        elif fault.kind == "memory":
            bytearray(1 << 62)
        elif fault.kind == "files":
            _use_up_files()
        elif fault.kind == "clock":
            _shift_clock(fault.shift_s)
        elif fault.kind == "exit":
            raise SystemExit(fault.code)


def _stop(seconds: float | None) -> None:
    """Stop this process, for ever or until another process lets it go on."""
    if seconds is not None:
        # Not one of the run's: nobody waits for it, and it knows nothing of the launch.
        command = ["/bin/sh", "-c", f"sleep {seconds:g}; kill -CONT {os.getpid()}"]
        nothing = subprocess.DEVNULL
        subprocess.Popen(
            command, env={"PATH": os.defpath}, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )
    os.kill(os.getpid(), signal.SIGSTOP)


def _spin() -> NoReturn:
    """Compute for ever in one call of the interpreter, which lets no other thread and no signal handler run."""
    collections.deque(itertools.repeat(None), maxlen=0)
    raise AssertionError("an endless iterator has ended")


def _use_up_files() -> None:
    """Let this process open no more files than it has open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))


def _shift_clock(shift_s: float) -> None:
    """Let the time of day jump for what this process asks Python's time module."""
    ask, convert = time.time, time.gmtime
    time.time = lambda: ask() + shift_s
    time.gmtime = lambda seconds=None: convert(time.time() if seconds is None else seconds)


def _damage(fault: Fault, arrays: Sequence[np.ndarray]) -> None:
    """Change one element in place, each as likely as the others."""
    numbers = random.Random(fault.seed)
    array = numbers.choices(arrays, [array.size for array in arrays])[0]
    index = np.unravel_index(numbers.randrange(array.size), array.shape)
    if fault.kind == "flip":
        words = array.view(f"u{array.itemsize}")
        bit = next(_bits(array.dtype, numbers)) if fault.bit is None else fault.bit % (8 * array.itemsize)
        words[index] ^= words.dtype.type(1 << bit)
    elif array.dtype == np.uint16:
        array[index] = 0x7FC0 if fault.kind == "nan" else 0x7F80
    else:
        array[index] = np.nan if fault.kind == "nan" else np.inf


def _bits(dtype: np.dtype[np.generic], numbers: random.Random) -> Iterator[int]:
    """Give bits of the exponent."""
    first, end = _EXPONENT_BITS.get(dtype, (0, 8 * dtype.itemsize))
    while True:
        yield numbers.randrange(first, end)
