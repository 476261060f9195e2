"""One block of memory, cut into named arrays."""

import math
from collections.abc import Mapping

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]

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
