"""How replicas share a stage's gradients, optimizer state and update (ZeRO stage 1, arXiv 1910.02054).

A stage's tensors lie one behind the other in memory. Runs of them are buckets, and each bucket is cut into one shard
per replica, where whole blocks of `hpcpipe.kernels.reduce.BLOCK` elements of a tensor begin. So the gradient norm,
which adds blocks, does not depend on the cuts.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from hpcpipe.kernels.reduce import BLOCK

LARGEST_BUCKET = 1 << 22
"""Elements after which a bucket ends with the next tensor, so that one can travel while another is computed."""


class Tensor(Protocol):
    """What the cut needs to know of a parameter tensor."""

    @property
    def name(self) -> str:
        """Its global name."""
        ...

    @property
    def size(self) -> int:
        """Number of elements."""
        ...

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        ...


@dataclass(frozen=True)
class Slice:
    """The elements ``[start, stop)`` of a tensor, in C order; `start` is a multiple of ``BLOCK``."""

    tensor: Tensor
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The tensor's global name."""
        return self.tensor.name

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.tensor.decays

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the last of which may be shorter."""
        return -(-self.size // BLOCK)

    def of(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return these elements of the tensor's array, as a flat view."""
        return arrays[self.name].reshape(-1)[self.start : self.stop]


@dataclass(frozen=True)
class Bucket:
    """Tensors that lie one behind the other, cut into shards.

    Attributes
    ----------
    tensors : tuple of Tensor
        In the order in which they lie.
    offsets : tuple of int
        The element at which each starts, counted from the first one's start.
    num_shards : int
        One per replica.
    """

    tensors: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    num_shards: int

    @property
    def size(self) -> int:
        """Elements from the start of the first tensor to the end of the last."""
        return self.offsets[-1] + self.tensors[-1].size

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """The bounds of all shards, counted as `offsets`: shard s is ``[cuts[s], cuts[s + 1])``."""
        even = (self.size * shard // self.num_shards for shard in range(1, self.num_shards))
        return (0, *map(self._nearest_block, even), self.size)

    def _nearest_block(self, place: int) -> int:
        """Return the start of a block, or the bucket's end, that is nearest to a place; the earlier one of two."""
        index = bisect_right(self.offsets, place) - 1
        offset, last = self.offsets[index], (self.tensors[index].size - 1) // BLOCK
        block = min((place - offset) // BLOCK, last)
        before = offset + block * BLOCK
        following = (*self.offsets, self.size)[index + 1]
        after = before + BLOCK if block < last else following
        return before if place - before <= after - place else after

    def slices(self, shard: int) -> Iterator[Slice]:
        """Yield the parts of tensors that a shard holds, at most one per tensor."""
        first, last = self.cuts[shard : shard + 2]
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            start, stop = max(first - offset, 0), min(last - offset, tensor.size)
            if start < stop:
                yield Slice(tensor, start, stop)

    def of(self, flat: np.ndarray, offsets: Mapping[str, int]) -> np.ndarray:
        """Return the bucket's elements of a block of memory in which its tensors lie in the same order.

        Parameters
        ----------
        flat : ndarray, shape (n,)
            The whole block.
        offsets : mapping of str to int
            The element at which each tensor starts.
        """
        start = offsets[self.tensors[0].name]
        return flat[start : start + self.size]


def cut_into_buckets(
    tensors: Sequence[Tensor], offsets: Mapping[str, int], alone: Collection[str], num_shards: int
) -> tuple[Bucket, ...]:
    """Cut a stage's tensors into buckets.

    Parameters
    ----------
    tensors : sequence of Tensor
        In the order in which they lie in memory.
    offsets : mapping of str to int
        The element at which each starts.
    alone : collection of str
        Names of tensors that are a bucket of their own, so that their cuts are the same on every stage.
    num_shards : int
        One per replica.
    """
    runs: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        ends = not runs or tensor.name in alone or runs[-1][-1].name in alone or size >= LARGEST_BUCKET
        if ends:
            runs.append([])
            size = 0
        runs[-1].append(tensor)
        size += tensor.size
    return tuple(
        Bucket(tuple(run), tuple(offsets[tensor.name] - offsets[run[0].name] for tensor in run), num_shards)
        for run in runs
    )
