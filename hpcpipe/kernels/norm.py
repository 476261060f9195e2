"""Layer normalisation (Ba, Kiros and Hinton, arXiv 1607.06450) over the last axis.

Shapes: R rows, C width.
"""

import numpy as np

from hpcpipe.kernels.arrays import Floats
from hpcpipe.kernels.jit import kernel

EPSILON = 1e-5
"""Added to the variance, as in GPT-2."""


@kernel(reorder=True)
def layernorm_forward(x: Floats, weight: Floats, bias: Floats, out: Floats, mean: Floats, rstd: Floats) -> None:
    """Compute ``out = (x - mean) * rstd * weight + bias`` with the mean and deviation of each row.

    Parameters
    ----------
    x : array, shape [R, C]
        Input.
    weight, bias : array, shape [C]
        Scale and shift of each column.
    out : array, shape [R, C]
        Overwritten.
    mean, rstd : array, shape [R]
        Overwritten with each row's mean and ``1 / sqrt(variance + 1e-5)``, which the backward takes.
    """
    scalar = x.dtype.type
    width = x.shape[1]
    for row in range(x.shape[0]):
        total = scalar(0)
        for c in range(width):
            total += x[row, c]
        average = total / scalar(width)
        total = scalar(0)
        for c in range(width):
            difference = x[row, c] - average
            total += difference * difference
        scale = scalar(1) / np.sqrt(total / scalar(width) + scalar(EPSILON))
        for c in range(width):
            out[row, c] = (x[row, c] - average) * scale * weight[c] + bias[c]
        mean[row] = average
        rstd[row] = scale


@kernel(reorder=True)
def layernorm_backward_input(dout: Floats, x: Floats, weight: Floats, mean: Floats, rstd: Floats, dx: Floats) -> None:
    """Add the gradient of the input to ``dx``, which holds the residual stream's gradient.

    With ``n = (x - mean) * rstd`` and ``g = dout * weight`` it is ``rstd * (g - average(g) - n * average(g * n))``,
    averages over each row.

    Parameters
    ----------
    dout : array, shape [R, C]
        Gradient of the output.
    x : array, shape [R, C]
        Input of the forward.
    weight : array, shape [C]
        Scale of each column.
    mean, rstd : array, shape [R]
        What the forward stored.
    dx : array, shape [R, C]
        Added to in place.
    """
    scalar = x.dtype.type
    width = x.shape[1]
    for row in range(x.shape[0]):
        average = mean[row]
        scale = rstd[row]
        total = scalar(0)
        total_normal = scalar(0)
        for c in range(width):
            gradient = dout[row, c] * weight[c]
            total += gradient
            total_normal += gradient * ((x[row, c] - average) * scale)
        total /= scalar(width)
        total_normal /= scalar(width)
        for c in range(width):
            normal = (x[row, c] - average) * scale
            dx[row, c] += scale * (dout[row, c] * weight[c] - total - normal * total_normal)


@kernel
def layernorm_backward_weight(
    dout: Floats,
    x: Floats,
    mean: Floats,
    rstd: Floats,
    dweight: Floats,
    dbias: Floats,
    scratch: Floats,
) -> None:
    """Add the gradients of weight and bias: the rows are summed first, from row 0 upwards, then added.

    Parameters
    ----------
    dout : array, shape [R, C]
        Gradient of the output.
    x : array, shape [R, C]
        Input of the forward.
    mean, rstd : array, shape [R]
        What the forward stored.
    dweight, dbias : array, shape [C]
        Added to in place.
    scratch : array, shape [2, C]
        Working space; its contents are lost.
    """
    width = x.shape[1]
    scratch[:] = 0
    for row in range(x.shape[0]):
        average = mean[row]
        scale = rstd[row]
        for c in range(width):
            scratch[0, c] += dout[row, c] * ((x[row, c] - average) * scale)
            scratch[1, c] += dout[row, c]
    for c in range(width):
        dweight[c] += scratch[0, c]
        dbias[c] += scratch[1, c]
