"""A fixed number of buffers that are handed out and given back."""

from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Pool(Generic[T]):
    """Buffers made once, at start.

    Parameters
    ----------
    buffers : iterable
        All of them.
    """

    def __init__(self, buffers: Iterable[T]) -> None:
        self._free = list(buffers)

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> T:
        """Hand out a buffer; the schedule's counts guarantee that there is one."""
        return self._free.pop()

    def give_back(self, buffer: T) -> None:
        """Take a buffer back."""
        self._free.append(buffer)
