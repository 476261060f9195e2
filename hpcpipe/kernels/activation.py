"""GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415).

``0.5 * x * (1 + tanh(u))`` with ``u = sqrt(2 / pi) * (x + 0.044715 * x**3)`` equals ``x / (1 + exp(-2 * u))``, which
is what is computed. Shapes: R rows, C width.
"""

import math

from hpcpipe.kernels.arrays import Floats
from hpcpipe.kernels.exponential import exp
from hpcpipe.kernels.jit import kernel

_CUBIC = 0.044715
_SCALE = 2 * math.sqrt(2 / math.pi)
_BLOCK = 2048  # elements that stay in the first-level cache between two passes


@kernel
def gelu_forward(x: Floats, out: Floats) -> None:
    """Compute ``out = gelu(x)``.

    Parameters
    ----------
    x : array, shape [R, C]
        Input.
    out : array, shape [R, C]
        Overwritten; may be ``x``.
    """
    scalar = x.dtype.type
    one, cubic, scale = scalar(1), scalar(_CUBIC), scalar(_SCALE)
    flat_x = x.reshape(x.size)
    flat_out = out.reshape(out.size)
    for i in range(flat_x.size):
        value = flat_x[i]
        flat_out[i] = value / (one + exp(-scale * (value + cubic * value * value * value)))


@kernel
def gelu_backward(dout: Floats, x: Floats, dx: Floats) -> None:
    """Compute ``dx = dout * gelu'(x)``.

    With ``s = 1 / (1 + exp(-2 * u))`` the derivative is ``s + x * s * (1 - s) * 2 * u'``.

    Parameters
    ----------
    dout : array, shape [R, C]
        Gradient of the output.
    x : array, shape [R, C]
        Input of the forward.
    dx : array, shape [R, C]
        Overwritten; may be ``dout``.
    """
    scalar = x.dtype.type
    one, cubic, scale = scalar(1), scalar(_CUBIC), scalar(_SCALE)
    three = scalar(3)
    flat_dout = dout.reshape(dout.size)
    flat_x = x.reshape(x.size)
    flat_dx = dx.reshape(dx.size)
    # Copied first, so that the costly loop is the same vector code whether or not dx is dout.
    for start in range(0, flat_x.size, _BLOCK):
        block_x = flat_x[start : start + _BLOCK]
        block_dout = flat_dout[start : start + _BLOCK]
        block_dx = flat_dx[start : start + _BLOCK]
        for i in range(block_x.size):
            block_dx[i] = block_dout[i]
        for i in range(block_x.size):
            value = block_x[i]
            square = value * value
            sigmoid = one / (one + exp(-scale * (value + cubic * value * square)))
            slope = scale * (one + three * cubic * square)
            block_dx[i] *= sigmoid + value * sigmoid * (one - sigmoid) * slope
