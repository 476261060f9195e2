"""One block of memory, cut into named arrays."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


class Spec(Protocol):
    """What a block of memory needs to know of a buffer."""

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
    def reserved_bytes(self) -> int:
        """Bytes of its elements and of what may be read after them."""
        ...


_ALIGNMENT = 64


def offsets_of(shapes: Shapes) -> tuple[dict[str, int], int]:
    """Return where an arena puts arrays, without making it.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Names and shapes, laid out in this order.

    Returns
    -------
    offsets : dict of str to int
        The element at which each array starts: the first of a cache line.
    size : int
        Elements of the whole block.
    """
    step = _ALIGNMENT // 4
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += -(-math.prod(shape) // step) * step
    return offsets, end


class Arena:
    """Zeroed float32 arrays that lie one behind the other in one allocation.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Names and shapes, laid out in this order; each array starts on a cache line.

    Attributes
    ----------
    arrays : dict of str to ndarray
        C-contiguous views of the block.
    flat : ndarray, shape (n,)
        The whole block; the gaps between arrays are zero and stay zero under sums and scaling.
    offsets : dict of str to int
        The element of `flat` at which each array starts.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.offsets, end = offsets_of(shapes)
        raw = np.zeros(end + _ALIGNMENT // 4, np.float32)
        shift = -raw.ctypes.data % _ALIGNMENT // 4
        self.flat = raw[shift : shift + end]
        self.arrays = {
            name: self.flat[offset : offset + math.prod(shapes[name])].reshape(shapes[name])
            for name, offset in self.offsets.items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of the block."""
        return int(self.flat.nbytes)


def bytes_of(specs: Mapping[str, Spec]) -> int:
    """Return the bytes of a block that holds buffers one behind the other, each from the start of a cache line."""
    return sum(-(-spec.reserved_bytes // _ALIGNMENT) * _ALIGNMENT for spec in specs.values())


def new_block(num_bytes: int) -> np.ndarray:
    """Return zeroed memory that starts on a cache line, as uint8."""
    raw = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    shift = -raw.ctypes.data % _ALIGNMENT
    return raw[shift : shift + num_bytes]


def cut_block(block: np.ndarray, specs: Mapping[str, Spec]) -> dict[str, np.ndarray]:
    """Return C-contiguous views of a block for buffers that lie in it as `bytes_of` counts them.

    Parameters
    ----------
    block : ndarray of uint8, shape (n,)
        At least ``bytes_of(specs)`` of them; the arrays share it with all others that are cut from it.
    specs : mapping of str to Spec
        Names and buffers, laid out in this order.
    """
    arrays, start = {}, 0
    for name, spec in specs.items():
        arrays[name] = block[start : start + spec.num_bytes].view(spec.dtype).reshape(spec.shape)
        start += -(-spec.reserved_bytes // _ALIGNMENT) * _ALIGNMENT
    return arrays


def new_arrays(specs: Mapping[str, Spec]) -> dict[str, np.ndarray]:
    """Return zeroed arrays in a block of their own."""
    return cut_block(new_block(bytes_of(specs)), specs)
