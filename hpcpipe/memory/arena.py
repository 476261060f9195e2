"""One block of memory, cut into named arrays."""

import math
from collections.abc import Mapping

import numpy as np

_ALIGNMENT = 64


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
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        step = _ALIGNMENT // 4
        offsets, end = {}, 0
        for name, shape in shapes.items():
            offsets[name] = end
            end += -(-math.prod(shape) // step) * step
        raw = np.zeros(end + step, np.float32)
        shift = -raw.ctypes.data % _ALIGNMENT // 4
        self.flat = raw[shift : shift + end]
        self.arrays = {
            name: self.flat[offset : offset + math.prod(shapes[name])].reshape(shapes[name])
            for name, offset in offsets.items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of the block."""
        return int(self.flat.nbytes)
