"""The exponential function, in a form that the compiler can turn into vector instructions.

The C library's ``expf`` is a call per element, which would make the activation as slow as the matrix products
around it.
"""

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.vectors import FLOAT, declare

_LOWEST = np.float32(-87.33654)  # ln of the smallest normal float32
_HIGHEST = np.float32(88.72284)  # above it float32 overflows
_LOG2_E = np.float32(1.44269504)
# ln 2 as a sum of two numbers; the first has few bits, so that its product with a whole number is exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_BIAS = np.float32(127)
_MANTISSA = np.float32(2**23)
# 1 / k!; on |r| <= ln(2) / 2 the term of r**8 is below a tenth of float32's last place.
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(k)) for k in range(2, 8))
# Minimax in relative error for 2**x on |x| <= 1/2.
_S0, _S1, _S2, _S3, _S4 = (
    np.float32(c) for c in (0.9999992614, 0.6931218147, 0.2402474483, 0.05591786076, 0.009570101968)
)
# Adding it leaves the nearest whole number, with the bias of float32's exponent on top, in the lowest bits.
_WHOLE = np.float32(1.5 * 2**23 + 127)
_SHIFT = np.uint32(23)
_BELOW_ZERO, _ABOVE_INFINITY = np.float32(-88), np.float32(89)


def exp(x: Any) -> Any:
    """Return e**x in the type of ``x``, a float32 or float64 scalar; results below 1.2e-38 are zero in float32.

    In float32 the error is at most 1.5 units in the last place, from ``e**x = 2**n * e**r`` with n the whole
    number nearest to ``x / ln 2`` and the Taylor series of ``e**r``. NaN gives NaN.
    """
    return np.exp(x)


@kernel
def _exp_float32(x: Any) -> Any:
    """Compute the float32 form; comparisons are written so that NaN takes a finite path and is put back last."""
    bounded = x if x > _LOWEST else _LOWEST
    bounded = bounded if bounded < _HIGHEST else _HIGHEST
    n = np.floor(bounded * _LOG2_E + _HALF)
    r = (bounded - n * _LN2_HIGH) - n * _LN2_LOW
    series = _C7
    series = series * r + _C6
    series = series * r + _C5
    series = series * r + _C4
    series = series * r + _C3
    series = series * r + _C2
    series = (series * r) * r + r + _ONE
    # 2**n in two factors, for n = 128 is beyond the exponents of one; the bits are set by way of a conversion.
    half = np.floor(n * _HALF)
    low = np.int32((half + _BIAS) * _MANTISSA).view(np.float32)
    high = np.int32((n - half + _BIAS) * _MANTISSA).view(np.float32)
    value = (series * low) * high
    value = value if x >= _LOWEST else np.float32(0)
    value = value if x <= _HIGHEST else np.float32(np.inf)
    return value if x == x else x


@kernel
def _exp_float64(x: Any) -> Any:
    """Compute the float64 form, for gradient checks, by the C library."""
    return math.exp(x)


def _call_float32(x: Any) -> Any:
    return _exp_float32(x)


def _call_float64(x: Any) -> Any:
    return _exp_float64(x)


@overload(exp)
def _choose_exp(x: Any) -> Any:
    """Choose the form at compile time; it keeps its order of operations also in kernels that reorder sums."""
    return _call_float32 if x == types.float32 else _call_float64


@intrinsic
def _multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute ``a * b + c``, rounded once where the processor can, and else twice."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(declare(builder, "llvm.fmuladd.f32", FLOAT, [FLOAT] * 3), arguments)

    return types.float32(types.float32, types.float32, types.float32), emit


# Kernels call intrinsics without the argument that numba passes to them.
_fma: Any = _multiply_add


@kernel
def exp_short(x: Any) -> Any:
    """Return e**x of a float32 scalar for what is rounded to bfloat16, off by at most 2**-17 of itself.

    Results below 2**-126 are off by at most 2**-126; below -87.7 they are zero, above 88.4 infinite, and NaN stays NaN.
    """
    bounded = _BELOW_ZERO if x < _BELOW_ZERO else x
    bounded = _ABOVE_INFINITY if bounded > _ABOVE_INFINITY else bounded
    # e**x = 2**n * 2**r, n whole and |r| <= 1/2.
    moved = np.float32(_fma(bounded, _LOG2_E, _WHOLE))
    r = _fma(bounded, _LOG2_E, -(moved - _WHOLE))
    series = _fma(_fma(_fma(_fma(_S4, r, _S3), r, _S2), r, _S1), r, _S0)
    return series * np.uint32(moved.view(np.uint32) << _SHIFT).view(np.float32)
