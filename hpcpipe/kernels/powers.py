"""Exponentials of vectors of 16 float32.

``2**x = 2**n * 2**r`` with n the whole number nearest to x, and a polynomial for ``2**r``.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir

from hpcpipe.kernels.vectors import FLOATS, LANES, WORDS, constant, fma

# Minimax in relative error for 2**x on |x| <= 1/2, from the highest power down.
LONG = (0.001326465281, 0.009671511129, 0.05550733954, 0.2402224243, 0.6931470037, 1.0)
"""Off by at most 2**-23 of the power, rounding included; 2**0 is 1 exactly."""
SHORT = (0.009570103866, 0.05591786145, 0.2402474506, 0.6931218148, 0.9999992604)
"""Off by at most 2**-18 of the power: for what is rounded to bfloat16."""
LOG2_E = math.log2(math.e)
_LOG2_E_REST = LOG2_E - float(np.float32(LOG2_E))
# Adding it leaves the nearest whole number, with float32's exponent bias on top, in the lowest bits.
_WHOLE = 1.5 * 2**23 + 127
_UNDERFLOW = -87.0


def _power(builder: Any, moved: Any, rest: Any, series: tuple[float, ...]) -> Any:
    """Compute the polynomial of the rest, and multiply it with the power of two that is in the lowest bits of moved."""
    value = constant(series[0])
    for coefficient in series[1:]:
        value = fma(builder, value, rest, constant(coefficient))
    power = builder.shl(builder.bitcast(moved, WORDS), ir.Constant(WORDS, [23] * LANES))
    return builder.fmul(value, builder.bitcast(power, FLOATS))


def power_of_two(builder: Any, x: Any, series: tuple[float, ...]) -> Any:
    """Compute 2**x for x between -127 and 127; NaN stays NaN. It is zero below -126.5."""
    moved = builder.fadd(x, constant(_WHOLE))
    return _power(builder, moved, builder.fsub(x, builder.fsub(moved, constant(_WHOLE))), series)


def exponential(builder: Any, x: Any) -> Any:
    """Compute e**x for x <= 88, zero below -87; off by at most 2**-22 of itself, and NaN stays NaN."""
    moved = fma(builder, x, constant(LOG2_E), constant(_WHOLE))
    whole = builder.fsub(moved, constant(_WHOLE))
    rest = fma(builder, x, constant(LOG2_E), builder.fneg(whole))
    value = _power(builder, moved, fma(builder, x, constant(_LOG2_E_REST), rest), LONG)
    return builder.select(builder.fcmp_ordered("<", x, constant(_UNDERFLOW)), constant(0.0), value)


def short_exponential(builder: Any, x: Any) -> Any:
    """Compute e**x for what is rounded to bfloat16, off by at most ``2**-17 + 2**-24 * |x|`` of itself.

    Below -87.7 it is zero, above 88.4 infinite, and NaN stays NaN.
    """
    x = builder.fmul(x, constant(LOG2_E))
    x = builder.select(builder.fcmp_ordered("<", x, constant(-127.0)), constant(-127.0), x)
    x = builder.select(builder.fcmp_ordered(">", x, constant(128.0)), constant(128.0), x)
    return power_of_two(builder, x, SHORT)
