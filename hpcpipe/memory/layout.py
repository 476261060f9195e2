"""Layouts: where named buffers lie in memory that they share, known before there is any.

Memory has two parts, since kernels read bfloat16 operands a little beyond their ends, and what they find there must
be finite: padded buffers share memory with padded buffers only, so it always holds bits of bfloat16 numbers.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from hpcpipe.memory.block import aligned, new_block
from hpcpipe.memory.place import Life, place

K = TypeVar("K", bound=Hashable)


class Spec(Protocol):
    """What a layout needs to know of a buffer."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its elements."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        ...

    @property
    def slack_bytes(self) -> int:
        """Bytes that may be read after its last element."""
        ...

    @property
    def steps(self) -> Life:
        """The first and the last step in which it is in use, where a layout shares memory between steps."""
        ...


class Extent(NamedTuple):
    """Bytes, or offsets in bytes, in the two parts of memory: of buffers without slack, and of those with slack."""

    plain: int
    padded: int

    def after(self, other: "Extent") -> "Extent":
        """Return this far behind another."""
        return Extent(self.plain + other.plain, self.padded + other.padded)


NOTHING = Extent(0, 0)


def largest(extents: Iterable[Extent]) -> Extent:
    """Return what each of several extents fits into."""
    return Extent(*(max(part) for part in zip(NOTHING, *extents, strict=True)))


@dataclass(frozen=True)
class Memory:
    """The two parts, as uint8."""

    plain: np.ndarray
    padded: np.ndarray

    def at(self, offset: Extent) -> "Memory":
        """Return what begins at an offset, to the end."""
        return Memory(self.plain[offset.plain :], self.padded[offset.padded :])

    def holds(self, extent: Extent) -> bool:
        """Return whether an extent fits."""
        return extent.plain <= self.plain.size and extent.padded <= self.padded.size


def new_memory(extent: Extent, name: str) -> Memory:
    """Return zeroed memory of an extent, counted under a name."""
    return Memory(new_block(extent.plain, name), new_block(extent.padded, name))


class Layout(Generic[K]):
    """Where buffers lie in a part of memory.

    Parameters
    ----------
    specs : mapping of key to Spec
        The buffers.
    shares_between_steps : bool
        Whether buffers whose steps do not meet share memory. If not, they lie one behind the other in their order.

    Attributes
    ----------
    extent : Extent
        What they take together.
    """

    def __init__(self, specs: Mapping[K, Spec], shares_between_steps: bool = False) -> None:
        self._specs = specs
        self._offsets: dict[K, int] = {}
        sizes = []
        for is_padded in (False, True):
            chosen = {key: spec for key, spec in specs.items() if (spec.slack_bytes > 0) is is_padded}
            lengths = [spec.num_bytes + spec.slack_bytes for spec in chosen.values()]
            if shares_between_steps:
                offsets, size = place(lengths, [spec.steps for spec in chosen.values()])
            else:
                offsets, size = _one_behind_the_other(lengths)
            self._offsets.update(zip(chosen, offsets, strict=True))
            sizes.append(size)
        self.extent = Extent(*sizes)

    def cut(self, memory: Memory) -> dict[K, np.ndarray]:
        """Return the buffers, C-contiguous, at the beginning of memory that holds at least `extent`."""
        return {key: self._cut(memory, self._offsets[key], spec) for key, spec in self._specs.items()}

    @staticmethod
    def _cut(memory: Memory, offset: int, spec: Spec) -> np.ndarray:
        part = memory.padded if spec.slack_bytes else memory.plain
        return part[offset : offset + spec.num_bytes].view(spec.dtype).reshape(spec.shape)


def new_arrays(specs: Mapping[K, Spec], name: str) -> dict[K, np.ndarray]:
    """Return zeroed buffers in memory of their own, counted under a name."""
    layout = Layout(specs)
    return layout.cut(new_memory(layout.extent, name))


def _one_behind_the_other(sizes: Iterable[int]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += aligned(size)
    return offsets, end
