"""Conversion between float32 and bfloat16, which numpy has no type for: bits in uint16, the upper half of a float32."""

from typing import Any

import numpy as np

from hpcpipe.kernels.arrays import BFloats, Floats
from hpcpipe.kernels.jit import kernel

_ONE = np.uint32(1)
_SHIFT = np.uint32(16)
_HALF = np.uint32(0x7FFF)
_NAN = np.uint32(0x7FC0)


@kernel
def round_bits(x: Any) -> Any:
    """Return the bfloat16 nearest to a float32 scalar, ties to even, as the low half of a uint32; NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    rounded = np.uint32(bits + _HALF + ((bits >> _SHIFT) & _ONE)) >> _SHIFT
    return rounded if x == x else _NAN


@kernel
def widen(bits: Any) -> Any:
    """Return the float32 of a bfloat16's bits, exactly."""
    return np.uint32(np.uint32(bits) << _SHIFT).view(np.float32)


@kernel
def to_bfloat16(x: Floats, out: BFloats, first: int, last: int) -> None:
    """Round float32 to the nearest bfloat16, ties to even.

    Parameters
    ----------
    x : float32 array, shape [R, C]
        Values.
    out : uint16 array, shape [R, C]
        Overwritten with their bits.
    first, last : int
        Rows to round.
    """
    for row in range(first, last):
        source, target = x[row], out[row]
        for c in range(source.shape[0]):
            target[c] = np.uint16(round_bits(source[c]))


@kernel
def from_bfloat16(x: BFloats, out: Floats) -> None:
    """Widen bfloat16 to float32.

    Parameters
    ----------
    x : uint16 array, shape [R, C]
        Bits.
    out : float32 array, shape [R, C]
        Overwritten.
    """
    for row in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[row, c] = widen(x[row, c])
