"""Blocks of memory, straight from the kernel: aligned, zeroed, on huge pages where it has them, and counted."""

import mmap
from collections import Counter
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

import numpy as np

from hpcpipe.errors import UsageError

ALIGNMENT = 64
"""Bytes of a cache line: every buffer starts on one."""

_HUGE_PAGE = 2 << 20
_SETTING = Path("sys/kernel/mm/transparent_hugepage/enabled")


class Block(mmap.mmap):
    """A mapping that knows what it is for; it goes back to the kernel with the last array in it."""

    name: str
    num_bytes: int


_blocks: WeakSet[Block] = WeakSet()


def register(block: Block, name: str, num_bytes: int) -> None:
    """Count a block's bytes under a name while it lives."""
    block.name, block.num_bytes = name, num_bytes
    _blocks.add(block)


def aligned(num_bytes: int) -> int:
    """Return the bytes of whole cache lines that hold so many bytes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def new_block(num_bytes: int, name: str = "other") -> np.ndarray:
    """Return zeroed memory as uint8.

    It starts on a page; from 2 MiB on it starts on a huge page, and the kernel is asked for such pages. Memory is
    taken from the machine as it is touched.

    Parameters
    ----------
    num_bytes : int
        Its size.
    name : str
        What it is counted under in `allocated_bytes`.
    """
    if num_bytes == 0:
        return np.empty(0, np.uint8)
    is_large = num_bytes >= _HUGE_PAGE
    length = num_bytes + is_large * _HUGE_PAGE
    # Python's default is a shared mapping, which huge pages have a setting of its own for.
    try:
        block = Block(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise UsageError(
            f"memory for {name}: there is no block of {num_bytes / 2**20:,.0f} MiB ({error.strerror}): raise the"
            ' limit (ulimit -v), use more nodes, set train.recompute = "full", or lower parallel.microbatch_size'
        ) from error
    register(block, name, num_bytes)
    if is_large and hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel may have none, as `huge_pages` says.
        with suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(block, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE if is_large else 0
    return whole[start : start + num_bytes]


def allocated_bytes() -> dict[str, int]:
    """Return the bytes of all blocks that this process holds, by name."""
    total: Counter[str] = Counter()
    for block in _blocks:
        total[block.name] += block.num_bytes
    return dict(total)


def huge_pages(root: Path = Path("/")) -> str:
    """Say in a few words whether large blocks are on transparent huge pages.

    Parameters
    ----------
    root : Path
        Where ``/sys`` is found; another one only in tests.
    """
    try:
        setting = (root / _SETTING).read_text()
    except OSError:
        return "no transparent huge pages: this kernel has none"
    chosen = setting.partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        return f"transparent huge pages on ({chosen})"
    return f"no transparent huge pages: {root / _SETTING} says {chosen or setting.strip()!r}"
