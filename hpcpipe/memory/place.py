"""Offsets from lifetimes: buffers that are never in use at the same time may lie at the same place."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from hpcpipe.memory.block import aligned

Life = tuple[int, int]
"""The first and the last moment at which a buffer is in use."""


def place(sizes: Sequence[int], lives: Sequence[Life]) -> tuple[list[int], int]:
    """Put buffers into one block so that those in use at the same time do not overlap.

    Largest first, of equals the one that is in use first, each at the lowest place where it fits (greedy by size:
    Pisarchyk & Lee, arXiv 2001.03288). Buffers of one size need no more memory than are in use at once.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of each buffer.
    lives : sequence of (int, int)
        When it is in use, both ends included.

    Returns
    -------
    offsets : list of int
        The byte at which each buffer starts, on a cache line.
    num_bytes : int
        Bytes of the block.
    """
    lengths = [aligned(size) for size in sizes]
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], *lives[i], i))
    offsets = [0] * len(lengths)
    firsts, lasts, starts, ends = np.zeros((4, len(order)), np.int64)
    for count, index in enumerate(order):
        length, (first, last) = lengths[index], lives[index]
        meets = np.flatnonzero((firsts[:count] <= last) & (lasts[:count] >= first))
        meets = meets[np.argsort(starts[meets], kind="stable")]
        # Everything below the largest end so far may be taken; a gap reaches from there to the next start.
        bottoms = np.maximum.accumulate(np.append(0, ends[meets]))
        fits = starts[meets] - bottoms[:-1] >= length
        start = int(bottoms[np.argmax(fits)] if fits.any() else bottoms[-1])
        firsts[count], lasts[count], starts[count], ends[count] = first, last, start, start + length
        offsets[index] = start
    return offsets, int(ends.max(initial=0))


def most_at_once(sizes: Sequence[int], lives: Sequence[Life]) -> int:
    """Return the most bytes that are in use at the same time: no block can be smaller; parameters as in `place`."""
    events = [(first, aligned(size)) for size, (first, _) in zip(sizes, lives, strict=True)]
    events += [(last + 1, -aligned(size)) for size, (_, last) in zip(sizes, lives, strict=True)]
    # At one moment buffers end before others begin.
    return max(accumulate(change for _, change in sorted(events)), default=0)
