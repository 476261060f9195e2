"""Matrix products of bfloat16 operands with float32 sums, and what is done to a block while it is in cache.

Shapes: R rows, K contraction, N columns. The left operand is row-major and can be read up to the next multiple of 32
rows and of 32 k; the right one is packed (`hpcpipe.kernels.panels`). Each product computes the rows ``first`` to
``last`` of its output, of which the first is a multiple of 32, and so is the last unless it is R: threads share a
product by rows. Elements do not depend on these cuts.
"""

from typing import Any

import numpy as np

from hpcpipe.kernels.arrays import BFloats, Floats, Panels
from hpcpipe.kernels.bfloat16 import round_bits, widen
from hpcpipe.kernels.block import (
    COLUMNS,
    DEPTH,
    PANEL_STEP_BYTES,
    ROW_BYTES,
    ROWS,
    begin_blocks,
    carray,
    end_blocks,
    multiply_block,
    new_block,
)
from hpcpipe.kernels.ends import add_row, bias_row, gelu_row, gelu_slope_row, residual_row, round_row
from hpcpipe.kernels.gelu import gelu, gelu_slope
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.panels import transpose

DEEP_ROWS = 128
"""Rows of the scratch of `product_deep`."""
_LEFT_BYTES = 1 << 18  # of the left operand, which stay in the second-level cache while panels stream past
_STORE, _BIAS, _GELU, _GELU_SLOPE = range(4)


@kernel
def _rows_at_once(num_k32: int) -> int:
    return max(_LEFT_BYTES // (num_k32 * DEPTH * 2) // ROWS * ROWS, ROWS)


@kernel
def _finish(
    end: int, block: Floats, row: int, rows: int, column: int, bias: Floats, other: BFloats, out: BFloats
) -> None:
    """Round a block to bfloat16, with what comes before."""
    if column + COLUMNS > out.shape[1]:
        _finish_remainder(end, block, row, rows, column, bias, other, out)
        return
    shift = bias.ctypes.data + column * 4
    for r in range(rows):
        line = block.ctypes.data + r * ROW_BYTES
        target = out.ctypes.data + (row + r) * out.strides[0] + column * 2
        another = other.ctypes.data + (row + r) * other.strides[0] + column * 2
        if end == _STORE:
            round_row(line, target)
        elif end == _BIAS:
            bias_row(line, shift, target)
        elif end == _GELU:
            gelu_row(line, shift, target, another)
        else:
            gelu_slope_row(line, another, target)


@kernel
def _finish_remainder(
    end: int, block: Floats, row: int, rows: int, column: int, bias: Floats, other: BFloats, out: BFloats
) -> None:
    """Do the same with the last columns, which are less than 32."""
    width = out.shape[1] - column
    for r in range(rows):
        line, target = block[r, :width], out[row + r, column : column + width]
        if end == _STORE:
            for c in range(width):
                target[c] = np.uint16(round_bits(line[c]))
        elif end == _GELU_SLOPE:
            hidden = other[row + r, column : column + width]
            for c in range(width):
                target[c] = np.uint16(round_bits(line[c] * gelu_slope(widen(hidden[c]))))
        else:
            shift = bias[column : column + width]
            for c in range(width):
                target[c] = np.uint16(round_bits(line[c] + shift[c]))
            if end == _GELU:
                activated = other[row + r, column : column + width]
                for c in range(width):
                    activated[c] = np.uint16(round_bits(gelu(widen(target[c]))))


@kernel
def _product(
    end: int, a: BFloats, b: Panels, bias: Floats, other: BFloats, out: BFloats, first: int, last: int
) -> None:
    steps = (a.shape[1] + DEPTH - 1) // DEPTH
    pointer = new_block()
    block = carray(pointer, (ROWS, COLUMNS))
    at_once = _rows_at_once(steps)
    begin_blocks()
    for top in range(first, last, at_once):
        for column in range(0, out.shape[1], COLUMNS):
            panel = b.ctypes.data + (column // COLUMNS) * steps * PANEL_STEP_BYTES
            for row in range(top, min(top + at_once, last), ROWS):
                left = a.ctypes.data + row * a.strides[0]
                multiply_block(left, a.strides[0], panel, steps, block.ctypes.data, False)
                _finish(end, block, row, min(ROWS, last - row), column, bias, other, out)
    end_blocks()


@kernel
def _no_floats(words: Panels) -> Any:
    """Return an empty float32 array for an end without a bias; a new one would be taken from the heap."""
    return words[:0].view(np.float32)


@kernel
def product(a: BFloats, b: Panels, out: BFloats, first: int, last: int) -> None:
    """Compute ``out = a @ b``.

    Parameters
    ----------
    a : uint16 array, shape [R, K]
        Left operand, bfloat16.
    b : uint16 array, shape [panel_elements(K, N)]
        Right operand.
    out : uint16 array, shape [R, N]
        Overwritten in the rows ``first`` to ``last``.
    first, last : int
        Rows.
    """
    _product(_STORE, a, b, _no_floats(b), out, out, first, last)


@kernel
def linear(a: BFloats, b: Panels, bias: Floats, out: BFloats, first: int, last: int) -> None:
    """Compute ``out = a @ b + bias``.

    Parameters
    ----------
    a, b, out, first, last
        As in `product`.
    bias : float32 array, shape [N]
        Added to every row before it is rounded.
    """
    _product(_BIAS, a, b, bias, out, out, first, last)


@kernel
def linear_gelu(
    a: BFloats, b: Panels, bias: Floats, hidden: BFloats, activated: BFloats, first: int, last: int
) -> None:
    """Compute ``hidden = a @ b + bias`` and ``activated = gelu(hidden)``, of the rounded values.

    Parameters
    ----------
    a, b, first, last
        As in `product`.
    bias : float32 array, shape [N]
        Added to every row.
    hidden, activated : uint16 array, shape [R, N]
        Overwritten.
    """
    _product(_GELU, a, b, bias, activated, hidden, first, last)


@kernel
def gelu_again(hidden: BFloats, activated: BFloats, first: int, last: int) -> None:
    """Compute ``activated = gelu(hidden)``, with the bits that `linear_gelu` stored.

    Parameters
    ----------
    hidden : uint16 array, shape [R, N]
        What `linear_gelu` stored.
    activated : uint16 array, shape [R, N]
        Overwritten in the rows ``first`` to ``last``.
    first, last : int
        Rows; threads may share them in any way.
    """
    block = carray(new_block(), (ROWS, COLUMNS))
    line, nothing = block[0], block[1]
    # Unlike zero, this leaves every value as it is when it is added, negative zero too.
    nothing[:] = np.float32(-0.0)
    width = hidden.shape[1]
    whole = width // COLUMNS * COLUMNS
    for row in range(first, last):
        for column in range(0, whole, COLUMNS):
            source = hidden[row, column : column + COLUMNS]
            for c in range(COLUMNS):
                line[c] = widen(source[c])
            target = activated.ctypes.data + row * activated.strides[0] + column * 2
            gelu_row(line.ctypes.data, nothing.ctypes.data, block.ctypes.data + 2 * ROW_BYTES, target)
        for c in range(whole, width):
            activated[row, c] = np.uint16(round_bits(gelu(widen(hidden[row, c]))))


@kernel
def product_gelu_backward(a: BFloats, b: Panels, hidden: BFloats, out: BFloats, first: int, last: int) -> None:
    """Compute ``out = (a @ b) * gelu'(hidden)``: the gradient of what GELU was applied to.

    Parameters
    ----------
    a, b, out, first, last
        As in `product`; a is the gradient of the output of the next product.
    hidden : uint16 array, shape [R, N]
        Input of GELU in the forward.
    """
    _product(_GELU_SLOPE, a, b, _no_floats(b), hidden, out, first, last)


@kernel
def linear_residual(a: BFloats, b: Panels, bias: Floats, residual: Floats, out: Floats, first: int, last: int) -> None:
    """Compute ``out = residual + (a @ b + bias)`` in float32.

    Parameters
    ----------
    a, b, first, last
        As in `product`.
    bias : float32 array, shape [N]
        Added to every row.
    residual : float32 array, shape [R, N]
        The residual stream.
    out : float32 array, shape [R, N]
        Overwritten; may be ``residual``.
    """
    steps = (a.shape[1] + DEPTH - 1) // DEPTH
    pointer = new_block()
    block = carray(pointer, (ROWS, COLUMNS))
    at_once = _rows_at_once(steps)
    begin_blocks()
    for top in range(first, last, at_once):
        for column in range(0, out.shape[1], COLUMNS):
            panel = b.ctypes.data + (column // COLUMNS) * steps * PANEL_STEP_BYTES
            width = min(COLUMNS, out.shape[1] - column)
            for row in range(top, min(top + at_once, last), ROWS):
                left = a.ctypes.data + row * a.strides[0]
                multiply_block(left, a.strides[0], panel, steps, block.ctypes.data, False)
                shift = bias[column : column + width]
                for r in range(min(ROWS, last - row)):
                    if width == COLUMNS:
                        residual_row(
                            block.ctypes.data + r * ROW_BYTES,
                            bias.ctypes.data + column * 4,
                            residual.ctypes.data + (row + r) * residual.strides[0] + column * 4,
                            out.ctypes.data + (row + r) * out.strides[0] + column * 4,
                        )
                        continue
                    line, stream = block[r, :width], residual[row + r, column : column + width]
                    target = out[row + r, column : column + width]
                    for c in range(width):
                        line[c] += shift[c]
                    for c in range(width):
                        target[c] = stream[c] + line[c]
    end_blocks()


@kernel
def weight_gradient(x: BFloats, d: Panels, gradient: Floats, scratch: BFloats, first: int, last: int) -> None:
    """Compute ``gradient += x.T @ d``; the product is finished before it is added.

    Parameters
    ----------
    x : uint16 array, shape [R, K]
        Input of the forward's product.
    d : uint16 array, shape [panel_elements(R, N)]
        Gradient of its output, packed by rows.
    gradient : float32 array, shape [K, N]
        Added to in the rows ``first`` to ``last``.
    scratch : uint16 array, shape [gradient_scratch_rows(R), R rounded up to 32]
        Working space of one thread; its contents are lost.
    first, last : int
        Rows of the gradient.
    """
    steps = (x.shape[0] + DEPTH - 1) // DEPTH
    pointer = new_block()
    block = carray(pointer, (ROWS, COLUMNS))
    begin_blocks()
    for top in range(first, last, scratch.shape[0]):
        bottom = min(top + scratch.shape[0], last)
        transpose(x, scratch, top, bottom)
        for column in range(0, gradient.shape[1], COLUMNS):
            panel = d.ctypes.data + (column // COLUMNS) * steps * PANEL_STEP_BYTES
            width = min(COLUMNS, gradient.shape[1] - column)
            for row in range(top, bottom, ROWS):
                left = scratch.ctypes.data + (row - top) * scratch.strides[0]
                multiply_block(left, scratch.strides[0], panel, steps, block.ctypes.data, False)
                for r in range(min(ROWS, bottom - row)):
                    if width == COLUMNS:
                        start = gradient.ctypes.data + (row + r) * gradient.strides[0] + column * 4
                        add_row(block.ctypes.data + r * ROW_BYTES, start)
                        continue
                    line, target = block[r, :width], gradient[row + r, column : column + width]
                    for c in range(width):
                        target[c] += line[c]
    end_blocks()


def gradient_scratch_rows(rows: int) -> int:
    """Return how many rows the scratch of `weight_gradient` has for R rows of input: a multiple of 32."""
    return max(_LEFT_BYTES // (-(-rows // DEPTH) * DEPTH * 2) // ROWS * ROWS, ROWS)


@kernel
def product_deep(a: BFloats, b: Panels, depth: int, out: BFloats, scratch: Floats, first: int, last: int) -> None:
    """Compute ``out = a @ b`` for a K that is much larger than N, such as a vocabulary.

    Parameters
    ----------
    a : uint16 array, shape [R, at least K]
        Left operand.
    b, out, first, last
        As in `product`.
    depth : int
        K.
    scratch : float32 array, shape [DEEP_ROWS, N rounded up to 32]
        Working space of one thread from the start of a cache line; its contents are lost.
    first, last : int
        Rows.
    """
    steps = (depth + DEPTH - 1) // DEPTH
    num_panels = (out.shape[1] + COLUMNS - 1) // COLUMNS
    at_once, deep = scratch.shape[0], _LEFT_BYTES // (scratch.shape[0] * DEPTH * 2)
    sums = scratch.reshape(at_once // ROWS * num_panels, ROWS, COLUMNS)
    begin_blocks()
    for top in range(first, last, at_once):
        bottom = min(top + at_once, last)
        for step in range(0, steps, deep):
            for panel in range(num_panels):
                right = b.ctypes.data + (panel * steps + step) * PANEL_STEP_BYTES
                for row in range(top, bottom, ROWS):
                    left = a.ctypes.data + row * a.strides[0] + step * DEPTH * 2
                    block = sums[(row - top) // ROWS * num_panels + panel]
                    multiply_block(left, a.strides[0], right, min(deep, steps - step), block.ctypes.data, step > 0)
        for row in range(top, bottom, ROWS):
            for panel in range(num_panels):
                block = sums[(row - top) // ROWS * num_panels + panel]
                _finish(_STORE, block, row, min(ROWS, bottom - row), panel * COLUMNS, _no_floats(b), out, out)
    end_blocks()
