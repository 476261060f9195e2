"""Layer normalisation between the float32 residual stream and bfloat16 operands of products.

As `hpcpipe.kernels.norm`; all arithmetic is float32. Shapes: R rows, C width.
"""

from typing import Any

import numpy as np

from hpcpipe.kernels.arrays import BFloats, Floats
from hpcpipe.kernels.bfloat16 import round_bits, widen
from hpcpipe.kernels.block import BLOCK_ELEMENTS, carray, new_block
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.lanes import add, fma, load, multiply, round_two, splat, store, subtract, total
from hpcpipe.kernels.lanes import widen as widen16
from hpcpipe.kernels.norm import EPSILON

_STEP = 64  # elements of four vectors
_HALF_BLOCK = BLOCK_ELEMENTS // 2
_ZERO, _ONE = np.float32(0), np.float32(1)


@kernel
def _moments(x: Any) -> Any:
    """Return the mean and the variance of a row, by the corrected two-pass algorithm.

    The second pass also adds up what the first mean is off by (Chan, Golub and LeVeque, The American Statistician 37,
    1983), so that equal elements have a variance of zero however large they are.
    """
    length, place = x.shape[0], x.ctypes.data
    whole, width = length // _STEP * _STEP, np.float32(length)
    zero = splat(_ZERO)
    sum0, sum1, sum2, sum3 = zero, zero, zero, zero
    for c in range(0, whole * 4, _STEP * 4):
        sum0 = add(sum0, load(place + c))
        sum1 = add(sum1, load(place + c + 64))
        sum2 = add(sum2, load(place + c + 128))
        sum3 = add(sum3, load(place + c + 192))
    average = total(add(add(sum0, sum1), add(sum2, sum3)))
    for c in range(whole, length):
        average += x[c]
    average /= width
    middle = splat(average)
    sum0, sum1, sum2, sum3 = zero, zero, zero, zero
    for c in range(0, whole * 4, _STEP * 2):
        difference0, difference1 = subtract(load(place + c), middle), subtract(load(place + c + 64), middle)
        sum0, sum1 = add(sum0, difference0), add(sum1, difference1)
        sum2, sum3 = fma(difference0, difference0, sum2), fma(difference1, difference1, sum3)
    rest, squares = total(add(sum0, sum1)), total(add(sum2, sum3))
    for c in range(whole, length):
        difference = x[c] - average
        rest += difference
        squares += difference * difference
    shift = rest / width
    return average + shift, max(squares / width - shift * shift, _ZERO)


@kernel
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
    whole = x.shape[1] // 32 * 32
    for row in range(first, last):
        line, target = x[row], out[row]
        average, variance = _moments(line)
        scale = _ONE / np.sqrt(variance + np.float32(EPSILON))
        middle, factor = splat(average), splat(scale)
        for c in range(0, whole, 32):
            normal0 = multiply(subtract(load(line.ctypes.data + c * 4), middle), factor)
            normal1 = multiply(subtract(load(line.ctypes.data + c * 4 + 64), middle), factor)
            place = weight.ctypes.data + c * 4
            shift = bias.ctypes.data + c * 4
            round_two(
                fma(normal0, load(place), load(shift)),
                fma(normal1, load(place + 64), load(shift + 64)),
                target.ctypes.data + c * 2,
            )
        for c in range(whole, line.shape[0]):
            target[c] = np.uint16(round_bits((line[c] - average) * scale * weight[c] + bias[c]))
        mean[row] = average
        rstd[row] = scale


@kernel
def _averages(dout: Any, x: Any, weight: Any, average: Any, scale: Any) -> Any:
    """Return the averages of ``g`` and of ``g * n`` over a row."""
    length = x.shape[0]
    whole, width, zero, middle = length // 32 * 32, np.float32(length), splat(_ZERO), splat(average)
    sum0, sum1, normal0, normal1 = zero, zero, zero, zero
    for c in range(0, whole, 32):
        up, factor, place = dout.ctypes.data + c * 2, weight.ctypes.data + c * 4, x.ctypes.data + c * 4
        gradient0, gradient1 = multiply(widen16(up), load(factor)), multiply(widen16(up + 32), load(factor + 64))
        sum0, sum1 = add(sum0, gradient0), add(sum1, gradient1)
        normal0 = fma(gradient0, subtract(load(place), middle), normal0)
        normal1 = fma(gradient1, subtract(load(place + 64), middle), normal1)
    sum_, sum_normal = total(add(sum0, sum1)), total(add(normal0, normal1))
    for c in range(whole, length):
        gradient = widen(dout[c]) * weight[c]
        sum_ += gradient
        sum_normal += gradient * (x[c] - average)
    return sum_ / width, sum_normal * scale / width


@kernel
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
    whole = x.shape[1] // 32 * 32
    for row in range(first, last):
        up, line, target, rounded = dout[row], x[row], dx[row], dx_bf16[row]
        average, scale = mean[row], rstd[row]
        average_g, average_gn = _averages(up, line, weight, average, scale)
        middle, factor, of_g, of_gn = splat(average), splat(scale), splat(-average_g), splat(-average_gn)
        for c in range(0, whole, 32):
            sum0 = _input_gradient(up, line, weight, target, c, middle, factor, of_g, of_gn)
            sum1 = _input_gradient(up, line, weight, target, c + 16, middle, factor, of_g, of_gn)
            round_two(sum0, sum1, rounded.ctypes.data + c * 2)
        for c in range(whole, line.shape[0]):
            normal = (line[c] - average) * scale
            target[c] += scale * (widen(up[c]) * weight[c] - average_g - normal * average_gn)
            rounded[c] = np.uint16(round_bits(target[c]))


@kernel
def _input_gradient(
    up: Any, line: Any, weight: Any, target: Any, c: int, middle: Any, factor: Any, of_g: Any, of_gn: Any
) -> Any:
    """Add the gradient to 16 elements of the stream's, and return the sum."""
    place = target.ctypes.data + c * 4
    normal = multiply(subtract(load(line.ctypes.data + c * 4), middle), factor)
    gradient = fma(widen16(up.ctypes.data + c * 2), load(weight.ctypes.data + c * 4), of_g)
    new = fma(factor, fma(normal, of_gn, gradient), load(place))
    store(new, place)
    return new


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
