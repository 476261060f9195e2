"""Softmax on blocks of scores, between the products of attention.

A block is 32 x 32 float32, one row behind the other (`hpcpipe.kernels.block`). Maxima and sums of a row are kept in 16
lanes until the row is complete, and then combined in one order.
"""

from typing import Any

from hpcpipe.kernels.arrays import Floats
from hpcpipe.kernels.block import COLUMNS, ROWS
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.softmax_rows import (
    LANE_BYTES,
    add_products,
    exponentials_of_row,
    fill_lanes,
    gradient_of_row,
    larger_lanes,
    round_row,
    sums_of_lanes,
)

LANES = LANE_BYTES // 4
_ROW_BYTES = COLUMNS * 4
_STEP_BYTES = COLUMNS * 2


@kernel
def raise_maxima(block: int, on_diagonal: bool, maxima: int) -> None:
    """Raise the lanes of each row's maximum to the values of a block.

    Parameters
    ----------
    block : int
        Address of the block.
    on_diagonal : bool
        Whether a row ends with its own number.
    maxima : int
        Address of 32 vectors of lanes, one for each row.
    """
    for row in range(ROWS):
        if on_diagonal:
            larger_lanes(block + row * _ROW_BYTES, row + 1, maxima + row * LANE_BYTES)
        else:
            larger_lanes(block + row * _ROW_BYTES, COLUMNS, maxima + row * LANE_BYTES)


@kernel
def exponentials(block: int, on_diagonal: bool, factor: Any, shifts: int, target: int, stride: int, sums: int) -> None:
    """Compute ``2**(factor * (score - shift))`` of a block, and add up what the rows come to.

    The relative error is at most 2e-7, but for that of the exponent; below 2**-126 the result is zero.

    Parameters
    ----------
    block : int
        Address of the scores.
    on_diagonal : bool
        Whether a row ends with its own number, and is zero behind.
    factor : float32
        Of every score.
    shifts : int
        Address of 32 float32: the largest score of each row.
    target : int
        Address of 32 rows of 32 bfloat16, which are overwritten.
    stride : int
        Bytes from one of these rows to the next.
    sums : int
        Address of 32 vectors of lanes, one for each row, which the unrounded results are added to.
    """
    for row in range(ROWS):
        scores, shift, out, lanes = block + row * _ROW_BYTES, shifts + row * 4, target + row * stride, row * LANE_BYTES
        if on_diagonal:
            exponentials_of_row(scores, row + 1, factor, shift, out, sums + lanes)
        else:
            exponentials_of_row(scores, COLUMNS, factor, shift, out, sums + lanes)


@kernel
def score_gradients(
    block: int,
    slopes: int,
    on_diagonal: bool,
    factor: Any,
    scale: Any,
    lse: int,
    projections: int,
    target: int,
    slope_target: int,
    stride: int,
) -> None:
    """Compute the probabilities p of a block whose columns are queries, and ``scale * p * (slope - projection)``.

    Parameters
    ----------
    block, slopes : int
        Addresses of the scores, and of the gradients of the probabilities.
    on_diagonal : bool
        Whether a row starts with its own number, and is zero before.
    factor, scale : float32
        The exponent is ``factor * score - lse``.
    lse, projections : int
        Addresses of 32 float32, one for each column.
    target, slope_target : int
        Addresses of 32 rows of 32 bfloat16, which are overwritten.
    stride : int
        Bytes from one of these rows to the next.
    """
    for row in range(ROWS):
        scores, gradients = block + row * _ROW_BYTES, slopes + row * _ROW_BYTES
        out, slope_out = target + row * stride, slope_target + row * stride
        if on_diagonal:
            gradient_of_row(scores, gradients, row, factor, scale, lse, projections, out, slope_out)
        else:
            gradient_of_row(scores, gradients, 0, factor, scale, lse, projections, out, slope_out)


@kernel
def row_products(a: int, a_stride: int, b: int, b_stride: int, steps: int, sums: Floats, out: Floats) -> None:
    """Compute the dot products of 32 rows of one matrix with those of another.

    Parameters
    ----------
    a, b : int
        Addresses of bfloat16 rows of ``32 * steps`` elements.
    a_stride, b_stride : int
        Bytes from one row to the next.
    steps : int
        At least 1.
    sums : float32 array, shape [32, 16]
        Working space.
    out : float32 array, shape [32]
        Overwritten.
    """
    for row in range(ROWS):
        fill_lanes(sums.ctypes.data + row * LANE_BYTES, 0)
    for step in range(steps):
        for row in range(ROWS):
            lanes = sums.ctypes.data + row * LANE_BYTES
            add_products(a + row * a_stride + step * _STEP_BYTES, b + row * b_stride + step * _STEP_BYTES, lanes)
    for row in range(0, ROWS, LANES):
        sums_of_lanes(sums.ctypes.data + row * LANE_BYTES, out.ctypes.data + row * 4)


@kernel
def store_rounded(block: int, factors: Floats, target: int, stride: int, rows: int, width: int) -> None:
    """Round a block to bfloat16, each row times a factor.

    Parameters
    ----------
    block : int
        Address of the block.
    factors : float32 array, shape [at least rows]
        One for each row.
    target : int
        Address of the first element.
    stride : int
        Bytes from one row of the target to the next.
    rows, width : int
        What is stored of the block.
    """
    for row in range(rows):
        round_row(block + row * _ROW_BYTES, factors[row], target + row * stride, width)
