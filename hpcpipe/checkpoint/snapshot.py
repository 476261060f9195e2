"""A copy of what a rank writes, taken at once, that a writer process reads while training goes on."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hpcpipe.memory.block import aligned


def snapshot_bytes(sizes_bytes: Iterable[int]) -> int:
    """Return the bytes of a snapshot of pieces of these sizes: each starts on a cache line."""
    return sum(map(aligned, sizes_bytes))


class Snapshot:
    """Pieces of tensors one behind the other in shared memory.

    Parameters
    ----------
    memory : uint8 array
        At least `snapshot_bytes` of the sizes; owned by the caller.
    sizes_bytes : sequence of int
        Of each piece.
    """

    def __init__(self, memory: NDArray[np.uint8], sizes_bytes: Sequence[int]) -> None:
        self._parts = list(_cut(memory, sizes_bytes))

    def take(self, arrays: Iterable[NDArray[np.generic]]) -> None:
        """Copy all pieces.

        Parameters
        ----------
        arrays : iterable of array
            C-contiguous, in the order and of the sizes given at the start; only read.
        """
        for part, array in zip(self._parts, arrays, strict=True):
            np.copyto(part, array.reshape(-1).view(np.uint8))

    def buffers(self) -> list[memoryview]:
        """Return the pieces, to be read."""
        return [part.data for part in self._parts]


def _cut(memory: NDArray[np.uint8], sizes_bytes: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    start = 0
    for size in sizes_bytes:
        yield memory[start : start + size]
        start += aligned(size)
