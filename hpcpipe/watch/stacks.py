"""Stacks of ranks: each writes them when it gets SIGUSR2, even while a kernel computes with Python's lock held."""

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from hpcpipe.watch.process import Process

_NAP_S = 0.02
_SETTLED_S = 0.1
_MOST_BYTES = 1 << 20


def collect_stacks(ranks: Mapping[int, tuple[Process, int]], patience_s: float = 1.0) -> dict[int, str]:
    """Ask ranks for the stacks of all of their threads.

    Parameters
    ----------
    ranks : mapping of int to (Process, int)
        Of each process number, the process and its descriptor of the file that it writes to; -1: it has none.
    patience_s : float
        How long to wait for them. A suspended process does not answer.

    Returns
    -------
    dict of int to str
        Of each process number what it wrote, or a sentence where nothing came.
    """
    before = {}
    for number, (process, handle) in ranks.items():
        size = _size(process, handle)
        if size is not None:
            before[number] = size
            with contextlib.suppress(OSError):
                process.send(signal.SIGUSR2)
    sizes, changed = dict(before), time.monotonic()
    deadline = changed + patience_s
    while before and time.monotonic() < deadline:
        time.sleep(_NAP_S)
        now = {number: _size(*ranks[number]) or 0 for number in before}
        if now != sizes:
            sizes, changed = now, time.monotonic()
        elif all(sizes[number] > before[number] for number in before) and time.monotonic() > changed + _SETTLED_S:
            break
    return {number: _read(*ranks[number], before.get(number)) for number in ranks}


def _path(process: Process, handle: int) -> Path:
    return Path(f"/proc/{process.pid}/fd/{handle}")


def _size(process: Process, handle: int) -> int | None:
    """Return the size of a rank's file; None where it has none or may not be looked at."""
    if handle < 0:
        return None
    try:
        return _path(process, handle).stat().st_size
    except OSError:
        return None


def _read(process: Process, handle: int, start: int | None) -> str:
    if start is None:
        return "no stacks: this rank cannot write any\n"
    try:
        descriptor = os.open(_path(process, handle), os.O_RDONLY)
    except OSError as error:
        return f"no stacks: {error.strerror}\n"
    try:
        text = os.pread(descriptor, _MOST_BYTES, start).decode(errors="replace")
    finally:
        os.close(descriptor)
    return text or "no stacks: this rank did not answer, as suspended ones do not\n"
