"""A file in memory in which what was never written takes no memory."""

import io
import os
from typing import Any

_PAGE_BYTES = 4096


class SparseFile(io.RawIOBase):
    """Bytes of which only the pages that were written to exist; all others read as zero.

    A file of the system's (memfd_create) does the same, but `ulimit -f` forbids a large one although it is on no disk.
    """

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._size = 0
        self._position = 0

    @property
    def size_bytes(self) -> int:
        """Size of the file, holes included."""
        return self._size

    @property
    def held_bytes(self) -> int:
        """Memory that the pages take."""
        return len(self._pages) * _PAGE_BYTES

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def writable(self) -> bool:
        """Say that it can be written."""
        return True

    def seekable(self) -> bool:
        """Say that it has positions."""
        return True

    def tell(self) -> int:
        """Return the position of the next read or write."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position, and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        """Make the file shorter or longer."""
        self._size = self._position if size is None else size
        last = -(-self._size // _PAGE_BYTES)
        for number in [number for number in self._pages if number >= last]:
            del self._pages[number]
        if self._size % _PAGE_BYTES and last - 1 in self._pages:
            kept = self._size % _PAGE_BYTES
            self._pages[last - 1][kept:] = bytes(_PAGE_BYTES - kept)
        return self._size

    def write(self, data: Any, /) -> int:
        """Write at the position, and go on behind it; all is taken at once."""
        view = memoryview(data).cast("B")
        for done, number, start, stop in _pages_of(self._position, view.nbytes):
            page = self._pages.setdefault(number, bytearray(_PAGE_BYTES))
            page[start:stop] = view[done : done + stop - start]
        self._position += view.nbytes
        self._size = max(self._size, self._position)
        return view.nbytes

    def readinto(self, target: Any, /) -> int:
        """Read from the position into a buffer, and go on behind it."""
        view = memoryview(target).cast("B")
        count = max(0, min(view.nbytes, self._size - self._position))
        for done, number, start, stop in _pages_of(self._position, count):
            page = self._pages.get(number)
            view[done : done + stop - start] = page[start:stop] if page else bytes(stop - start)
        self._position += count
        return count


def _pages_of(position: int, num_bytes: int) -> list[tuple[int, int, int, int]]:
    """List the pages that a range touches: bytes before it in the range, its number, and from where to where in it."""
    parts = []
    done = 0
    while done < num_bytes:
        number, start = divmod(position + done, _PAGE_BYTES)
        stop = min(_PAGE_BYTES, start + num_bytes - done)
        parts.append((done, number, start, stop))
        done += stop - start
    return parts
