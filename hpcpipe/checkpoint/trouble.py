"""A disk that is slow or fails, for tests: ``HPCPIPE_TEST_DISK=slow=1e6,fail=sync:EIO:2-3``.

``slow`` is a number of bytes per second. ``fail`` names an operation (``reserve``, ``write``, ``sync``, ``rename``,
``read``), the error, and the first and last of its calls in this process that fail, all if left out; it may come
several times.
"""

import errno
import os
import time
from collections import Counter
from collections.abc import Mapping

VARIABLE = "HPCPIPE_TEST_DISK"


class Trouble:
    """What operations on a disk come to.

    Parameters
    ----------
    text : str
        As above; empty: no trouble.

    Raises
    ------
    ValueError
        The text is something else.
    """

    def __init__(self, text: str) -> None:
        self._bytes_per_s = 0.0
        self._failures: list[tuple[str, int, int, int]] = []
        self._calls: Counter[str] = Counter()
        for setting in filter(None, text.split(",")):
            name, _, value = setting.partition("=")
            if name == "slow":
                self._bytes_per_s = float(value)
            elif name == "fail":
                operation, code, *calls = value.split(":")
                first, _, last = (calls[0] if calls else "1-1000000000").partition("-")
                self._failures.append((operation, getattr(errno, code), int(first), int(last or first)))
            else:
                raise ValueError(f"{VARIABLE} = {text}: {name!r} is neither slow nor fail")

    def meet(self, operation: str, num_bytes: int = 0) -> None:
        """Take the time that an operation takes, or fail it.

        Raises
        ------
        OSError
            It is to fail.
        """
        if self._bytes_per_s:
            time.sleep(num_bytes / self._bytes_per_s)
        if self._failures:
            self._calls[operation] += 1
            for name, code, first, last in self._failures:
                if name == operation and first <= self._calls[operation] <= last:
                    raise OSError(code, os.strerror(code))


def from_environment(environ: Mapping[str, str] = os.environ) -> Trouble:
    """Return what the environment asks for."""
    return Trouble(environ.get(VARIABLE, ""))
