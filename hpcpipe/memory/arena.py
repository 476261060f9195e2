"""One block of memory, cut into named arrays of float32."""

import math
from collections.abc import Mapping

import numpy as np

from hpcpipe.memory.block import ALIGNMENT, new_block

Shapes = Mapping[str, tuple[int, ...]]

_STEP = ALIGNMENT // 4


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
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += -(-math.prod(shape) // _STEP) * _STEP
    return offsets, end


class Arena:
    """Zeroed float32 arrays that lie one behind the other in one block.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Names and shapes, laid out in this order; each array starts on a cache line.
    name : str
        What the block is counted under.

    Attributes
    ----------
    arrays : dict of str to ndarray
        C-contiguous views of the block.
    flat : ndarray, shape (n,)
        The whole block; the gaps between arrays are zero and stay zero under sums and scaling.
    offsets : dict of str to int
        The element of `flat` at which each array starts.
    """

    def __init__(self, shapes: Shapes, name: str = "arrays") -> None:
        self.offsets, end = offsets_of(shapes)
        self.flat = new_block(4 * end, name).view(np.float32)
        self.arrays = {
            name: self.flat[offset : offset + math.prod(shapes[name])].reshape(shapes[name])
            for name, offset in self.offsets.items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of the block."""
        return int(self.flat.nbytes)
