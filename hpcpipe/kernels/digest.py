"""A number by which two copies of an array are compared, at the speed of a cache."""

from functools import partial
from typing import Any

import numpy as np

from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.threads import ALONE, Team

BLOCK = 256
"""Words of 32 bits that are added by themselves."""

_PAIRS = BLOCK // 2
_WORD_BYTES = 4
# What starting threads costs is what one thread takes for about this many words.
_SMALLEST_SHARED = 1 << 19
_MASK = (1 << 64) - 1


@kernel
def digest_blocks(words: Any, first: int, last: int) -> Any:
    """Sum some blocks of `BLOCK` words, two words taken as one number of 64 bits, modulo 2**64.

    Block b counts ``2 * b + 1`` times, so that it matters where it lies.

    Parameters
    ----------
    words : array of uint32, shape [n]
        C-contiguous.
    first, last : int
        The first block, and the one behind the last.

    Returns
    -------
    uint64
        The sum. Those of parts of the blocks add up to that of all.
    """
    total = np.uint64(0)
    num_words = words.shape[0]
    pairs = words[: num_words // 2 * 2].view(np.uint64)
    for block in range(first, last):
        block_total = np.uint64(0)
        for pair in pairs[block * _PAIRS : (block + 1) * _PAIRS]:
            block_total += pair
        total += block_total * np.uint64(2 * block + 1)
    if num_words % 2 and first < last and last * BLOCK >= num_words:
        total += np.uint64(words[num_words - 1]) * np.uint64(2 * last - 1)
    return total


def digest(array: np.ndarray, team: Team = ALONE) -> int:
    """Return a number that depends on every bit of an array, and on nothing else.

    Any change within one element changes it, and so do blocks of 1 KiB that have changed places. Changes of several
    elements go unseen if they cancel out, which those of chance do once in 2**64 times or so. It is no cryptographic
    hash: who wants to hide a change can.

    Parameters
    ----------
    array : ndarray
        Of any shape and dtype; only read. It is C-contiguous, with elements of 4 or 8 bytes, where nothing may be
        allocated.
    team : Team
        Threads that share a large array; the number is the same however many there are.

    Returns
    -------
    int
        At least 0, below 2**64.
    """
    words = _words(array)
    num_blocks = -(-words.size // BLOCK)
    if team.num_threads == 1 or words.size < _SMALLEST_SHARED:
        return int(digest_blocks(words, 0, num_blocks))
    parts: list[int] = []
    team.run(partial(_digest_part, parts), num_blocks, words)
    return sum(parts) & _MASK


def _digest_part(parts: list[int], words: np.ndarray, first: int, last: int) -> None:
    parts.append(int(digest_blocks(words, first, last)))


def _words(array: np.ndarray) -> np.ndarray:
    """Return an array's bytes as words, the last one filled up with zeros."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.itemsize % _WORD_BYTES == 0 and flat.flags.writeable and flat.flags.aligned:
        return flat.view(np.uint32)
    content = flat.view(np.uint8)
    words = np.zeros(-(-content.size // _WORD_BYTES), np.uint32)
    words.view(np.uint8)[: content.size] = content
    return words
