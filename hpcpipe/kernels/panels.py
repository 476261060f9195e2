"""Right operands of bfloat16 products, packed so that a block reads them from the first byte to the last.

A panel holds 32 columns. For each 32 of k it has two halves of 16 columns, and a half has 16 pairs of k with one
column's pair beside the next one's: ``[N / 32][K / 32][2][16 pairs][16 columns][2]``, N and K rounded up, zero where
they end. Tile units take a half as it lies, and vector units a pair. Shapes: K contraction, N columns.
"""

from typing import Any

import numpy as np

from hpcpipe.kernels.arrays import BFloats, Floats, Panels
from hpcpipe.kernels.bfloat16 import round_bits
from hpcpipe.kernels.block import COLUMNS, DEPTH, PANEL_STEP_BYTES
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.shuffle import (
    finish_stores,
    transpose_floats,
    transpose_floats_past_caches,
    transpose_pairs,
    zip_floats,
    zip_floats_past_caches,
    zip_rows,
)

_STEP = PANEL_STEP_BYTES // 4  # pairs in 32 of k
_LARGE = 1 << 19  # elements; the update of so many passes 16 MiB


def panel_elements(depth: int, columns: int) -> int:
    """Return the uint16 elements of a packed operand.

    Parameters
    ----------
    depth, columns : int
        K and N.
    """
    return -(-columns // COLUMNS) * -(-depth // DEPTH) * DEPTH * COLUMNS


@kernel
def _pair(low: Any, high: Any) -> Any:
    return np.uint32(low) | (np.uint32(high) << np.uint32(16))


@kernel
def _passes_caches(source: Floats, packed: Panels) -> bool:
    """Tell whether panels are stored past the caches: those of a large matrix do not stay there until they are read."""
    return source.size >= _LARGE and packed.ctypes.data % 64 == 0


@kernel
def pack_rows(source: Floats, packed: Panels, first_row: int, last_row: int) -> None:
    """Pack rows of a float32 matrix whose rows are k: the right operand of ``a @ source``.

    Parameters
    ----------
    source : float32 array, shape [K, N]
        Values, rounded to bfloat16.
    packed : uint16 array, shape [panel_elements(K, N)]
        The panels; places of other rows are left as they are.
    first_row, last_row : int
        Rows to pack; the first is a multiple of 32, and so is the last unless it is K. After row K comes zero.
    """
    pack_tile(source, packed, first_row, last_row, 0, source.shape[1])


@kernel
def pack_tile(
    source: Floats, packed: Panels, first_row: int, last_row: int, first_column: int, last_column: int
) -> None:
    """Pack some columns of rows as `pack_rows` does.

    Parameters
    ----------
    source, packed, first_row, last_row
        As in `pack_rows`.
    first_column, last_column : int
        Columns to pack; the first is a multiple of 32, and so is the last unless it is N. After column N comes zero.
    """
    depth, columns = source.shape
    steps = (depth + DEPTH - 1) // DEPTH
    words, past_caches = packed.view(np.uint32), _passes_caches(source, packed)
    for step in range(first_row // DEPTH, (last_row + DEPTH - 1) // DEPTH):
        row = step * DEPTH
        for column in range(first_column, last_column, COLUMNS):
            start = ((column // COLUMNS) * steps + step) * _STEP
            if row + DEPTH <= depth and column + COLUMNS <= columns:
                address = source.ctypes.data + row * source.strides[0] + column * 4
                target = packed.ctypes.data + start * 4
                for _ in range(DEPTH // 2):
                    if past_caches:
                        zip_floats_past_caches(address, address + source.strides[0], target)
                    else:
                        zip_floats(address, address + source.strides[0], target)
                    address += 2 * source.strides[0]
                    target += 64
            else:
                _round_remainder(source, row, column, True, words[start : start + _STEP])
    if past_caches:
        finish_stores()


@kernel
def pack_columns(source: Floats, packed: Panels, first_row: int, last_row: int) -> None:
    """Pack rows of a float32 matrix whose columns are k: the right operand of ``a @ source.T``.

    Parameters
    ----------
    source : float32 array, shape [N, K]
        Values, rounded to bfloat16.
    packed : uint16 array, shape [panel_elements(K, N)]
        The panels; those of other rows are left as they are.
    first_row, last_row : int
        Rows to pack; the first is a multiple of 32, and so is the last unless it is N. After row N comes zero.
    """
    pack_transposed_tile(source, packed, first_row, last_row, 0, source.shape[1])


@kernel
def pack_transposed_tile(
    source: Floats, packed: Panels, first_row: int, last_row: int, first_column: int, last_column: int
) -> None:
    """Pack some columns of rows as `pack_columns` does.

    Parameters
    ----------
    source, packed, first_row, last_row
        As in `pack_columns`.
    first_column, last_column : int
        Columns to pack; the first is a multiple of 32, and so is the last unless it is K. After column K comes zero.
    """
    columns, depth = source.shape
    steps = (depth + DEPTH - 1) // DEPTH
    words, past_caches = packed.view(np.uint32), _passes_caches(source, packed)
    for row in range(first_row // COLUMNS * COLUMNS, last_row, COLUMNS):
        for k in range(first_column, last_column, DEPTH):
            start = (row // COLUMNS * steps + k // DEPTH) * _STEP
            if row + COLUMNS <= columns and k + DEPTH <= depth:
                address = source.ctypes.data + row * source.strides[0] + k * 4
                target = packed.ctypes.data + start * 4
                for _ in range(2):
                    if past_caches:
                        transpose_floats_past_caches(address, source.strides[0], target)
                    else:
                        transpose_floats(address, source.strides[0], target)
                    address += 16 * source.strides[0]
                    target += _STEP * 2
            else:
                _round_remainder(source, row, k, False, words[start : start + _STEP])
    if past_caches:
        finish_stores()


@kernel
def pack_bfloat16_rows(source: BFloats, packed: Panels, first_panel: int, last_panel: int) -> None:
    """Pack panels of a bfloat16 matrix whose rows are k: the right operand of ``a @ source``.

    Parameters
    ----------
    source : uint16 array, shape [K, N]
        Bits of the values; rows may lie apart.
    packed : uint16 array, shape [panel_elements(K, N)]
        The panels, the first of which starts a cache line.
    first_panel, last_panel : int
        Panels to pack, of 32 columns each.
    """
    depth, columns = source.shape
    steps = (depth + DEPTH - 1) // DEPTH
    words = packed.view(np.uint32)
    # Steps outside, panels inside: neighbouring columns are read one after the other.
    for step in range(steps):
        row = step * DEPTH
        for panel in range(first_panel, last_panel):
            column = panel * COLUMNS
            start = (panel * steps + step) * _STEP
            if row + DEPTH <= depth and column + COLUMNS <= columns:
                address = source.ctypes.data + row * source.strides[0] + column * 2
                zip_rows(address, source.strides[0], packed.ctypes.data + start * 4)
            else:
                _pack_remainder(source, row, column, words[start : start + _STEP])


@kernel
def _round_remainder(source: Floats, row: int, column: int, rows_are_k: bool, words: Any) -> None:
    """Round and pack the elements of a step that exist, and zero for the others; k goes down or along."""
    for half in range(2):
        for pair in range(DEPTH // 2):
            for c in range(16):
                bits = np.uint32(0)
                for odd in range(2):
                    k, n = 2 * pair + odd, half * 16 + c
                    down, along = (k, n) if rows_are_k else (n, k)
                    r, place = row + down, column + along
                    if r < source.shape[0] and place < source.shape[1]:
                        bits |= np.uint32(round_bits(source[r, place])) << np.uint32(16 * odd)
                words[half * (_STEP // 2) + pair * 16 + c] = bits


@kernel
def _pack_remainder(source: BFloats, row: int, column: int, words: Any) -> None:
    """Pack the elements of a step that exist, and zero for the others."""
    depth, columns = source.shape
    for half in range(2):
        for pair in range(DEPTH // 2):
            for c in range(16):
                k, place = row + 2 * pair, column + half * 16 + c
                low = source[k, place] if k < depth and place < columns else np.uint16(0)
                high = source[k + 1, place] if k + 1 < depth and place < columns else np.uint16(0)
                words[half * (_STEP // 2) + pair * 16 + c] = _pair(low, high)


@kernel
def transpose(source: BFloats, target: BFloats, first_column: int, last_column: int) -> None:
    """Transpose columns of a bfloat16 matrix.

    Parameters
    ----------
    source : uint16 array, shape [R, C]
        Bits; rows may lie apart.
    target : uint16 array, shape [at least last_column - first_column, at least R rounded up to 32]
        Row c gets column ``first_column + c``, and zero from R to the next multiple of 32.
    first_column, last_column : int
        Columns to transpose.
    """
    rows = source.shape[0]
    whole_columns = first_column + (last_column - first_column) // 16 * 16
    whole_rows = rows // 32 * 32
    for row in range(0, whole_rows, 32):
        for column in range(first_column, whole_columns, 16):
            transpose_pairs(
                source.ctypes.data + row * source.strides[0] + column * 2,
                source.strides[0],
                target.ctypes.data + (column - first_column) * target.strides[0] + row * 2,
                target.strides[0],
            )
        for column in range(whole_columns, last_column):
            for r in range(row, row + 32):
                target[column - first_column, r] = source[r, column]
    for column in range(first_column, last_column):
        for r in range(whole_rows, rows):
            target[column - first_column, r] = source[r, column]
        for r in range(rows, (rows + 31) // 32 * 32):
            target[column - first_column, r] = 0
