"""Two versions of a rank's parts in one block of memory, which outlives the rank where another process maps it."""

from collections.abc import Sequence

import numpy as np

from hpcpipe.kernels.digest import digest
from hpcpipe.memory.block import aligned
from hpcpipe.recovery.standing import NOTHING

VERSIONS = 2
_INT_BYTES = 8
_FLOAT_BYTES = 4


def store_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes of a `Store` of parts with so many elements."""
    return _head_bytes(len(sizes)) + VERSIONS * aligned(sum(sizes) * _FLOAT_BYTES)


class Store:
    """Versions of a rank's parts, the step that each is of, and the digests that its parts should have.

    A process that maps the block of another one sees a version's step only while all of the version is there: it is
    taken away before the first element changes, and set after the last.

    Parameters
    ----------
    memory : uint8 array
        `store_bytes` of it, owned by the caller; zeroed, or another process's store.
    sizes : sequence of int
        Elements of each part.

    Attributes
    ----------
    steps : int64 array, shape (VERSIONS,)
        Of each version, -1 for none.
    digests : uint64 array, shape (VERSIONS, parts)
        As the update has left them, zeros where it did not know.
    versions : list of float32 array
        The parts one behind the other.
    """

    def __init__(self, memory: np.ndarray, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        ends = VERSIONS * _INT_BYTES
        self.steps = memory[:ends].view(np.int64)
        table = memory[ends : ends + VERSIONS * len(sizes) * _INT_BYTES].view(np.uint64)
        self.digests = table.reshape(VERSIONS, len(sizes))
        total = sum(sizes) * _FLOAT_BYTES
        starts = [_head_bytes(len(sizes)) + version * aligned(total) for version in range(VERSIONS)]
        self.versions = [memory[start : start + total].view(np.float32) for start in starts]

    def clear(self) -> "Store":
        """Note that there is no version, as in new memory, and return the store."""
        self.steps[:] = NOTHING
        return self

    def oldest(self, step: int) -> int:
        """Return the version that gives way to a step: its own, if it is there already."""
        steps: list[int] = self.steps.tolist()
        return steps.index(step) if step in steps else steps.index(min(steps))

    def find(self, step: int) -> int:
        """Return the version of a step that is there."""
        return int(self.steps.tolist().index(step))

    def is_damaged(self, version: int) -> bool:
        """Return whether a version is not what the update has left, as far as that is known."""
        known = self.digests[version].tolist()
        if not any(known):
            return False
        ends = np.cumsum(self.sizes).tolist()
        flat = self.versions[version]
        parts = (flat[end - size : end] for end, size in zip(ends, self.sizes, strict=True))
        return any(digest(part) != value for part, value in zip(parts, known, strict=True))


def _head_bytes(num_parts: int) -> int:
    return aligned(VERSIONS * _INT_BYTES * (1 + num_parts))
