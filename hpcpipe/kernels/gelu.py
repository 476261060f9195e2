"""GELU of one value, and its derivative, for kernels that apply it to a block.

The tanh form (Hendrycks and Gimpel, arXiv 1606.08415) as in `hpcpipe.kernels.activation`.
"""

import math
from typing import Any

import numpy as np

from hpcpipe.kernels.exponential import exp
from hpcpipe.kernels.jit import kernel

_CUBIC = np.float32(0.044715)
_SCALE = np.float32(2 * math.sqrt(2 / math.pi))
_ONE = np.float32(1)
_THREE_CUBIC = np.float32(3 * 0.044715)


@kernel
def gelu(x: Any) -> Any:
    """Return ``x / (1 + exp(-2 * u))`` with ``u = sqrt(2 / pi) * (x + 0.044715 * x**3)``, in float32."""
    return x / (_ONE + exp(-_SCALE * (x + _CUBIC * x * x * x)))


@kernel
def gelu_slope(x: Any) -> Any:
    """Return the derivative of `gelu`: ``s + x * s * (1 - s) * 2 * u'`` with ``s = 1 / (1 + exp(-2 * u))``."""
    square = x * x
    sigmoid = _ONE / (_ONE + exp(-_SCALE * (x + _CUBIC * x * square)))
    return sigmoid + x * sigmoid * (_ONE - sigmoid) * (_SCALE * (_ONE + _THREE_CUBIC * square))
