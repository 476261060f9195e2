"""Layer normalisation between the float32 residual stream and bfloat16 operands of products.

As `hpcpipe.kernels.norm`; all arithmetic is float32. Shapes: R rows, C width.
"""

from typing import Any

import numba
import numpy as np

from hpcpipe.kernels.arrays import BFloats, Floats
from hpcpipe.kernels.bfloat16 import round_bits, widen
from hpcpipe.kernels.block import BLOCK_ELEMENTS, new_block
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.norm import EPSILON

# numba has no types for the names that it exports.
carray: Any = numba.carray  # type: ignore[attr-defined]
_HALF_BLOCK = BLOCK_ELEMENTS // 2
_ZERO, _ONE = np.float32(0), np.float32(1)


@kernel(inline=True)
def _moments(x: Any) -> Any:
    """Return the mean and the variance of a row, by the corrected two-pass algorithm.

    The second pass also adds up what the first mean is off by (Chan, Golub and LeVeque, The American Statistician 37,
    1983), so that equal elements have a variance of zero however large they are.
    """
    width = np.float32(x.shape[0])
    total = _ZERO
    for c in range(x.shape[0]):
        total += x[c]
    average = total / width
    rest, squares = _ZERO, _ZERO
    for c in range(x.shape[0]):
        difference = x[c] - average
        rest += difference
        squares += difference * difference
    shift = rest / width
    return average + shift, max(squares / width - shift * shift, _ZERO)


@kernel(reorder=True)
def layernorm_forward_bf16(
    x: Floats, weight: Floats, bias: Floats, out: BFloats, mean: Floats, rstd: Floats, first: int, last: int
) -> None:
    """Compute ``out = (x - mean) * rstd * weight + bias`` with the mean and deviation of each row.

    Before it is rounded to bfloat16, an output is off by at most ``2**-20 * (|weight| * rstd * max|x| + |out| +
    |bias|)``, the maximum over its row.

    Parameters
    ----------
    x : float32 array, shape [R, C]
        Input.
    weight, bias : float32 array, shape [C]
        Scale and shift of each column.
    out : uint16 array, shape [R, C]
        Overwritten in the rows ``first`` to ``last``.
    mean, rstd : float32 array, shape [R]
        Overwritten likewise with each row's mean and ``1 / sqrt(variance + 1e-5)``, which the backward takes.
    first, last : int
        Rows; threads may share them in any way.
    """
    for row in range(first, last):
        line, target = x[row], out[row]
        average, variance = _moments(line)
        scale = _ONE / np.sqrt(variance + np.float32(EPSILON))
        for c in range(line.shape[0]):
            target[c] = np.uint16(round_bits((line[c] - average) * scale * weight[c] + bias[c]))
        mean[row] = average
        rstd[row] = scale


@kernel(inline=True)
def _averages(dout: Any, x: Any, weight: Any, average: Any, scale: Any) -> Any:
    """Return the averages of ``g`` and of ``g * n`` over a row."""
    width = np.float32(x.shape[0])
    total, total_normal = _ZERO, _ZERO
    for c in range(x.shape[0]):
        gradient = widen(dout[c]) * weight[c]
        total += gradient
        total_normal += gradient * (x[c] - average)
    return total / width, total_normal * scale / width


@kernel(reorder=True)
def layernorm_backward_input_bf16(
    dout: BFloats,
    x: Floats,
    weight: Floats,
    mean: Floats,
    rstd: Floats,
    dx: Floats,
    dx_bf16: BFloats,
    first: int,
    last: int,
) -> None:
    """Add the gradient of the input to ``dx``, the residual stream's gradient, and round the sum for the next product.

    With ``n = (x - mean) * rstd`` and ``g = dout * weight`` it is ``rstd * (g - average(g) - n * average(g * n))``,
    averages over each row. What is added is off by at most ``2**-20 * rstd * (1 + max|n|)**2 * max|g|``, maxima over
    the row.

    Parameters
    ----------
    dout : uint16 array, shape [R, C]
        Gradient of the output.
    x : float32 array, shape [R, C]
        Input of the forward.
    weight : float32 array, shape [C]
        Scale of each column.
    mean, rstd : float32 array, shape [R]
        What the forward stored.
    dx : float32 array, shape [R, C]
        Added to in place, in the rows ``first`` to ``last``.
    dx_bf16 : uint16 array, shape [R, C]
        Overwritten likewise with what ``dx`` then is, rounded.
    first, last : int
        Rows; threads may share them in any way.
    """
    for row in range(first, last):
        up, line, target, rounded = dout[row], x[row], dx[row], dx_bf16[row]
        average, scale = mean[row], rstd[row]
        total, total_normal = _averages(up, line, weight, average, scale)
        for c in range(line.shape[0]):
            normal = (line[c] - average) * scale
            target[c] += scale * (widen(up[c]) * weight[c] - total - normal * total_normal)
        for c in range(line.shape[0]):
            rounded[c] = np.uint16(round_bits(target[c]))


@kernel
def layernorm_backward_weight_bf16(
    dout: BFloats,
    x: Floats,
    mean: Floats,
    rstd: Floats,
    dweight: Floats,
    dbias: Floats,
    first_column: int,
    last_column: int,
) -> None:
    """Add the gradients of weight and bias: the rows are summed first, from row 0 upwards, then added.

    Before it is added, a sum is off by at most ``2**-24 * (R + 4)`` times the sum of its terms' magnitudes.

    Parameters
    ----------
    dout : uint16 array, shape [R, C]
        Gradient of the output.
    x : float32 array, shape [R, C]
        Input of the forward.
    mean, rstd : float32 array, shape [R]
        What the forward stored.
    dweight, dbias : float32 array, shape [C]
        Added to in place, in the columns ``first_column`` to ``last_column``.
    first_column, last_column : int
        Columns; threads may share them in any way.
    """
    sums = carray(new_block(), (2, _HALF_BLOCK))
    for start in range(first_column, last_column, _HALF_BLOCK):
        stop = min(start + _HALF_BLOCK, last_column)
        of_weight, of_bias = sums[0, : stop - start], sums[1, : stop - start]
        of_weight[:] = 0
        of_bias[:] = 0
        for row in range(x.shape[0]):
            up, line = dout[row, start:stop], x[row, start:stop]
            average, scale = mean[row], rstd[row]
            for c in range(stop - start):
                gradient = widen(up[c])
                of_weight[c] += gradient * ((line[c] - average) * scale)
                of_bias[c] += gradient
        for c in range(stop - start):
            dweight[start + c] += of_weight[c]
            dbias[start + c] += of_bias[c]
