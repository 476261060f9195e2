"""The operands of attention's products: where the rows of a head lie, and how they are packed.

A head of a sample is T rows of D elements, cut into blocks of 32 by 32. Whole blocks are read where they lie.
"""

from typing import Any, NamedTuple

import numpy as np

from hpcpipe.kernels.arrays import BFloats, Floats
from hpcpipe.kernels.block import COLUMNS, DEPTH, PANEL_STEP_BYTES, ROWS
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.shuffle import transpose_words, zip_rows
from hpcpipe.kernels.softmax import store_rounded

STEP_BYTES = DEPTH * 2
"""Of 32 elements of a row."""


class Head(NamedTuple):
    """Shape of one head of one sample: T, D, and the blocks of 32 that they are cut into."""

    context: int
    size: int
    blocks: int
    steps: int


@kernel
def head_of(qkv: BFloats, batch: int, heads: int) -> Any:
    """Return the shape of a head of ``qkv``, of shape [batch * T, 3 * heads * D]."""
    context, size = qkv.shape[0] // batch, qkv.shape[1] // 3 // heads
    return Head(context, size, (context + ROWS - 1) // ROWS, (size + DEPTH - 1) // DEPTH)


@kernel
def fills_blocks(head: Any) -> Any:
    """Tell whether a head is made of whole blocks."""
    return head.context % ROWS == 0 and head.size % DEPTH == 0


@kernel
def address_of(array: Any) -> Any:
    """Return the address of the first element."""
    # numba's own are unsigned, and what may be either is float64 to it.
    return np.int64(array.ctypes.data)


@kernel
def rows_of(source: BFloats, row: int, column: int, head: Any, copy: BFloats) -> Any:
    """Return the address and the stride of a head's rows; what does not fill blocks is copied, with zeros behind."""
    if fills_blocks(head):
        return address_of(source) + row * source.strides[0] + column * 2, source.strides[0]
    length = head.steps * DEPTH
    for r in range(head.blocks * ROWS):
        target = copy[r * length : r * length + length]
        width = head.size if r < head.context else 0
        for c in range(width):
            target[c] = source[row + r, column + c]
        for c in range(width, length):
            target[c] = 0
    return address_of(copy), length * 2


@kernel
def pack_head_rows(source: int, stride: int, head: Any, packed: int) -> None:
    """Pack a head's rows as the right operand whose contraction is over them."""
    for block in range(head.blocks):
        for panel in range(head.steps):
            zip_rows(
                source + block * ROWS * stride + panel * STEP_BYTES,
                stride,
                packed + (panel * head.blocks + block) * PANEL_STEP_BYTES,
            )


@kernel
def pack_head_columns(source: int, stride: int, head: Any, packed: int) -> None:
    """Pack a head's rows as the right operand whose contraction is over the elements of a row."""
    for block in range(head.blocks):
        for step in range(head.steps):
            for half in range(2):
                transpose_words(
                    source + (block * ROWS + half * 16) * stride + step * STEP_BYTES,
                    stride,
                    packed + (block * head.steps + step) * PANEL_STEP_BYTES + half * (PANEL_STEP_BYTES // 2),
                )


@kernel
def store_block(
    result: int, factors: Floats, out: BFloats, row: int, column: int, block: int, step: int, head: Any
) -> None:
    """Round a block of the output of a head whose first element is at `row` and `column`."""
    rows, columns = min(ROWS, head.context - block * ROWS), min(COLUMNS, head.size - step * COLUMNS)
    place = (row + block * ROWS) * out.strides[0] + (column + step * COLUMNS) * 2
    store_rounded(result, factors, address_of(out) + place, out.strides[0], rows, columns)
