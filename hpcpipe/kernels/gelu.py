"""GELU of one value, and its derivative, where the result is rounded to bfloat16.

The tanh form (Hendrycks and Gimpel, arXiv 1606.08415) as in `hpcpipe.kernels.activation`: with
``u = sqrt(2 / pi) * (x + 0.044715 * x**3)`` and ``s = 1 / (1 + exp(-2 * u))`` it is ``x * s``, and its derivative
``s + x * s * (1 - s) * 2 * u'``.
"""

import math
from typing import Any

import numpy as np

from hpcpipe.kernels.exponential import exp_short
from hpcpipe.kernels.jit import kernel

CUBIC = 0.044715
SCALE = 2 * math.sqrt(2 / math.pi)
FAR = 9.5
"""Beyond it, s is 0 or 1, as far as bfloat16 can tell."""

_CUBIC, _THREE_CUBIC, _SCALE = np.float32(CUBIC), np.float32(3 * CUBIC), np.float32(SCALE)
_FAR, _ONE = np.float32(FAR), np.float32(1)


@kernel
def gelu(x: Any) -> Any:
    """Return GELU of a float32 scalar, off by at most ``2**-15`` of itself, and by 1e-31 where x is below -9.5."""
    x = -_FAR if x < -_FAR else x
    bounded = _FAR if x > _FAR else x
    return x / (_ONE + exp_short(-_SCALE * (bounded + _CUBIC * bounded * (bounded * bounded))))


@kernel
def gelu_slope(x: Any) -> Any:
    """Return the derivative of GELU at a float32 scalar, off by at most ``2**-15``."""
    x = -_FAR if x < -_FAR else x
    x = _FAR if x > _FAR else x
    square = x * x
    sigmoid = _ONE / (_ONE + exp_short(-_SCALE * (x + _CUBIC * x * square)))
    return sigmoid + x * sigmoid * (_ONE - sigmoid) * (_SCALE * (_ONE + _THREE_CUBIC * square))
