"""Causal multi-head self-attention on bfloat16 operands, without a matrix of all scores.

Shapes: R rows (batch x T), T context, C width, D = C / heads. A row of ``qkv`` is ``q | k | v``, each of C columns, of
which head h has columns h * D to (h + 1) * D. Scores and probabilities exist for blocks of 32 queries by 32 keys, of
which those above the diagonal are skipped; sums are float32. The backward computes the probabilities again from the
logarithm of each query's sum, as Dao et al. do (FlashAttention, arXiv 2205.14135); it goes through blocks of keys, with
scores transposed, so that the gradients of keys and values are finished products of one pass.

Heads of samples are independent: threads share a call by pairs of (sample, head), and no bit depends on the cut.
"""

import math
from typing import Any

import numpy as np

from hpcpipe.kernels.arrays import BFloats, Floats
from hpcpipe.kernels.attention_operands import (
    STEP_BYTES,
    address_of,
    fills_blocks,
    head_of,
    pack_head_columns,
    pack_head_rows,
    rows_of,
    store_block,
)
from hpcpipe.kernels.block import (
    COLUMNS,
    DEPTH,
    PANEL_STEP_BYTES,
    ROWS,
    begin_blocks,
    carray,
    end_blocks,
    multiply_block,
    new_block,
)
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.shuffle import transpose_pairs
from hpcpipe.kernels.softmax import (
    LANES,
    exponentials,
    raise_maxima,
    row_products,
    score_gradients,
)
from hpcpipe.kernels.softmax_rows import LANE_BYTES, fill_lanes, finish_sums, maxima_of_lanes

_LOG2_E = np.float32(math.log2(math.e))
_BLOCK_BYTES = ROWS * COLUMNS * 4
# In the backward: the contraction of a part of the gradient of queries. So many keys by 32 queries in bfloat16 are as
# large as a block.
_KEYS_AT_ONCE = 64
_BLOCKS_AT_ONCE = _KEYS_AT_ONCE // ROWS


def attention_scratch_bf16(context: int, width: int, heads: int) -> int:
    """Return the elements of working space that one thread needs, for the forward and for the backward.

    Parameters
    ----------
    context, width, heads : int
        T, C, and the number of heads.

    Returns
    -------
    int
        Elements of a 1-D array of uint16, whatever the batch.
    """
    size = width // heads
    blocks, steps = -(-context // ROWS), -(-size // DEPTH)
    operand = blocks * steps * ROWS * DEPTH
    copies = 4 if context % ROWS or size % DEPTH else 0
    probabilities = _KEYS_AT_ONCE * (blocks + 1) * COLUMNS
    return (5 + 2 + copies) * operand + 2 * probabilities + 2 * 2 * blocks * ROWS


@kernel
def _softmax(scores: int, blocks: int, scale: Any, target: int, stride: int, lse: Floats, inverse: Floats) -> None:
    """Turn the scores of 32 queries into exponentials, of which the last block is on the diagonal.

    `lse` has as many elements as there are queries.
    """
    lanes = carray(new_block(), (2, ROWS, LANES))
    statistics = carray(new_block(), (2, ROWS))
    maxima, shifts = address_of(lanes), address_of(statistics)
    sums, logarithms = maxima + ROWS * LANE_BYTES, shifts + ROWS * 4
    factor = scale * _LOG2_E
    for row in range(ROWS):
        fill_lanes(maxima + row * LANE_BYTES, -np.inf)
        fill_lanes(sums + row * LANE_BYTES, 0)
    for block in range(blocks):
        raise_maxima(scores + block * _BLOCK_BYTES, block == blocks - 1, maxima)
    for row in range(0, ROWS, LANES):
        maxima_of_lanes(maxima + row * LANE_BYTES, shifts + row * 4)
    for block in range(blocks):
        out, on_diagonal = target + block * STEP_BYTES, block == blocks - 1
        exponentials(scores + block * _BLOCK_BYTES, on_diagonal, factor, shifts, out, stride, sums)
    for row in range(0, ROWS, LANES):
        part = sums + row * LANE_BYTES
        finish_sums(part, scale, shifts + row * 4, address_of(inverse) + row * 4, logarithms + row * 4)
    for row in range(lse.shape[0]):
        lse[row] = statistics[1, row]


@kernel
def attention_forward_bf16(
    qkv: BFloats, batch: int, heads: int, out: BFloats, lse: Floats, scratch: BFloats, first: int, last: int
) -> None:
    """Compute ``out = softmax(q @ k.T / sqrt(D)) @ v`` for some heads of samples, each query up to its own key.

    Exponentials are rounded to bfloat16 for the product with v, which is then divided in float32 by the sum of the
    unrounded ones, and rounded. Let p be the exact probabilities of a query, g its largest sum of ``|q * k| / sqrt(D)``
    over a key, and r = 2**-20 + 2**-22 * (T + (D + 8) * g). Then ``out`` is off by at most (2**-7 + r) times the sum of
    ``p * |v|``, and ``lse`` by r. Subnormal numbers may count as zero.

    Parameters
    ----------
    qkv : uint16 array, shape [R, 3 * C]
        Queries, keys and values, bfloat16.
    batch, heads : int
        Number of samples in the rows, and of heads in the columns.
    out : uint16 array, shape [R, C]
        Overwritten.
    lse : float32 array, shape [batch, heads, T]
        Overwritten with the logarithm of the sum of the exponentials of each query, which the backward takes.
    scratch : uint16 array, shape [attention_scratch_bf16(T, C, heads)]
        Working space of one thread from the start of a cache line; its contents are lost.
    first, last : int
        Of ``sample * heads + head``: what is computed.
    """
    head = head_of(qkv, batch, heads)
    width = heads * head.size
    operand = head.blocks * head.steps * ROWS * DEPTH
    num_copies = 0 if fills_blocks(head) else 2
    copies = scratch[: num_copies * operand]
    k_columns = address_of(scratch) + copies.size * 2
    v_rows = k_columns + operand * 2
    scores = v_rows + operand * 2
    probabilities = scores + head.blocks * _BLOCK_BYTES
    stride = (head.blocks + 1) * STEP_BYTES
    scale = np.float32(1 / math.sqrt(head.size))
    result = address_of(carray(new_block(), (ROWS, COLUMNS)))
    inverse = carray(new_block(), (ROWS,))
    begin_blocks()
    for pair in range(first, last):
        row, column = pair // heads * head.context, pair % heads * head.size
        k, k_stride = rows_of(qkv, row, width + column, head, copies)
        pack_head_columns(k, k_stride, head, k_columns)
        v, v_stride = rows_of(qkv, row, 2 * width + column, head, copies)
        pack_head_rows(v, v_stride, head, v_rows)
        q, q_stride = rows_of(qkv, row, column, head, copies[operand:])
        for block in range(head.blocks):
            top, bottom = block * ROWS, min(block * ROWS + ROWS, head.context)
            for key in range(block + 1):
                panel = k_columns + key * head.steps * PANEL_STEP_BYTES
                multiply_block(q + top * q_stride, q_stride, panel, head.steps, scores + key * _BLOCK_BYTES, False)
            row_lse = lse[pair // heads, pair % heads, top:bottom]
            _softmax(scores, block + 1, scale, probabilities, stride, row_lse, inverse)
            for step in range(head.steps):
                panel = v_rows + step * head.blocks * PANEL_STEP_BYTES
                multiply_block(probabilities, stride, panel, block + 1, result, False)
                store_block(result, inverse, out, row, column, block, step, head)
    end_blocks()


@kernel
def _add_query_gradients(
    slopes: int, stride: int, k_rows: int, first_key: int, last_key: int, head: Any, sums: int
) -> None:
    """Add what some blocks of keys contribute to the gradients of all queries that see them."""
    tile = address_of(carray(new_block(), (ROWS, COLUMNS)))
    tile_stride = _KEYS_AT_ONCE * 2
    for block in range(first_key, head.blocks):
        seen = min(last_key, block + 1) - first_key
        for key in range(seen):
            for half in range(2):
                transpose_pairs(
                    slopes + key * ROWS * stride + block * STEP_BYTES + half * 32,
                    stride,
                    tile + half * 16 * tile_stride + key * STEP_BYTES,
                    tile_stride,
                )
        for step in range(head.steps):
            panel = k_rows + (step * head.blocks + first_key) * PANEL_STEP_BYTES
            total = sums + (block * head.steps + step) * _BLOCK_BYTES
            multiply_block(tile, tile_stride, panel, seen, total, first_key > 0)


@kernel
def _compute_slopes(
    key: int, k: Any, v: Any, q_columns: int, do_columns: int, statistics: int, head: Any, target: Any
) -> None:
    """Compute probabilities and gradients of scores of 32 keys, for all queries that see them.

    `k`, `v`: address and stride of the rows of the head. `target`: addresses of 32 rows of both results, and their
    stride.
    """
    scores = address_of(carray(new_block(), (ROWS, COLUMNS)))
    slopes = address_of(carray(new_block(), (ROWS, COLUMNS)))
    scale = np.float32(1 / math.sqrt(head.size))
    for block in range(key, head.blocks):
        panel = block * head.steps * PANEL_STEP_BYTES
        multiply_block(k[0] + key * ROWS * k[1], k[1], q_columns + panel, head.steps, scores, False)
        multiply_block(v[0] + key * ROWS * v[1], v[1], do_columns + panel, head.steps, slopes, False)
        score_gradients(
            scores,
            slopes,
            block == key,
            scale * _LOG2_E,
            scale,
            statistics + block * ROWS * 4,
            statistics + (head.blocks + block) * ROWS * 4,
            target[0] + block * STEP_BYTES,
            target[1] + block * STEP_BYTES,
            target[2],
        )


@kernel
def _backward_of_head(
    dout: BFloats,
    qkv: BFloats,
    out: BFloats,
    lse: Floats,
    row: int,
    column: int,
    dqkv: BFloats,
    scratch: BFloats,
    head: Any,
) -> None:
    """Compute the gradients of the head whose first query is at `row` and `column`."""
    operand = head.blocks * head.steps * ROWS * DEPTH
    num_copies = 0 if fills_blocks(head) else 4
    copies = scratch[: num_copies * operand]
    statistics = scratch[copies.size : copies.size + 4 * head.blocks * ROWS].view(np.float32)
    statistics_place = address_of(statistics)
    q_columns = statistics_place + statistics.size * 4
    do_columns, q_rows, do_rows = q_columns + operand * 2, q_columns + operand * 4, q_columns + operand * 6
    k_rows, q_sums = q_columns + operand * 8, q_columns + operand * 10
    probabilities, stride = q_columns + operand * 14, (head.blocks + 1) * STEP_BYTES
    slopes = probabilities + _KEYS_AT_ONCE * stride

    width = qkv.shape[1] // 3
    do, do_stride = rows_of(dout, row, column, head, copies)
    pack_head_columns(do, do_stride, head, do_columns)
    pack_head_rows(do, do_stride, head, do_rows)
    o, o_stride = rows_of(out, row, column, head, copies[operand:])
    _take_statistics(lse, do, do_stride, o, o_stride, statistics, head)
    q, q_stride = rows_of(qkv, row, column, head, copies[operand:])
    pack_head_columns(q, q_stride, head, q_columns)
    pack_head_rows(q, q_stride, head, q_rows)
    k = rows_of(qkv, row, width + column, head, copies[2 * operand :])
    pack_head_rows(k[0], k[1], head, k_rows)
    v = rows_of(qkv, row, 2 * width + column, head, copies[3 * operand :])

    result = address_of(carray(new_block(), (ROWS, COLUMNS)))
    ones = carray(new_block(), (ROWS,))
    ones[:] = 1
    for first_key in range(0, head.blocks, _BLOCKS_AT_ONCE):
        last_key = min(first_key + _BLOCKS_AT_ONCE, head.blocks)
        for key in range(first_key, last_key):
            part = (key - first_key) * ROWS * stride
            target = (probabilities + part, slopes + part, stride)
            _compute_slopes(key, k, v, q_columns, do_columns, statistics_place, head, target)
            for step in range(head.steps):
                panel = (step * head.blocks + key) * PANEL_STEP_BYTES
                seen, place = head.blocks - key, part + key * STEP_BYTES
                multiply_block(slopes + place, stride, q_rows + panel, seen, result, False)
                store_block(result, ones, dqkv, row, width + column, key, step, head)
                multiply_block(probabilities + place, stride, do_rows + panel, seen, result, False)
                store_block(result, ones, dqkv, row, 2 * width + column, key, step, head)
        _add_query_gradients(slopes, stride, k_rows, first_key, last_key, head, q_sums)
        # Later keys are hidden from these queries.
        for block in range(first_key, last_key):
            for step in range(head.steps):
                total = q_sums + (block * head.steps + step) * _BLOCK_BYTES
                store_block(total, ones, dqkv, row, column, block, step, head)


@kernel
def _take_statistics(
    lse: Floats, do: int, do_stride: int, o: int, o_stride: int, statistics: Floats, head: Any
) -> None:
    """Compute for each query lse in powers of two, and the product of its output and its output's gradient."""
    sums = carray(new_block(), (ROWS, LANES))
    padded = head.blocks * ROWS
    for i in range(head.context):
        statistics[i] = lse[i] * _LOG2_E
    for i in range(head.context, padded):
        statistics[i] = 0
    for block in range(head.blocks):
        top = block * ROWS
        left, right = do + top * do_stride, o + top * o_stride
        row_products(left, do_stride, right, o_stride, head.steps, sums, statistics[padded + top : padded + top + ROWS])


@kernel
def attention_backward_bf16(
    dout: BFloats,
    qkv: BFloats,
    out: BFloats,
    lse: Floats,
    batch: int,
    heads: int,
    dqkv: BFloats,
    scratch: BFloats,
    first: int,
    last: int,
) -> None:
    """Compute the gradient of queries, keys and values for some heads of samples.

    Probabilities p and gradients of scores are rounded to bfloat16 for the products that they enter, and each gradient
    once at its end. With r as in the forward, but of the largest g of the head, and w the sum of ``|dout * v|`` for a
    query and a key: that of a value is off by at most (2**-7 + r) times the sum of ``p * |dout|``; those of queries and
    keys by (2**-6 + 2 * r) / sqrt(D) times the sum of ``p * (w + 2 * sum(p * w)) * |x|``, x being the keys or the
    queries and the inner sum that over all keys. Subnormal numbers may count as zero.

    Parameters
    ----------
    dout : uint16 array, shape [R, C]
        Gradient of the output, bfloat16.
    qkv : uint16 array, shape [R, 3 * C]
        Input of the forward.
    out, lse : uint16 and float32 array, shapes [R, C] and [batch, heads, T]
        What the forward wrote.
    batch, heads : int
        Number of samples in the rows, and of heads in the columns.
    dqkv : uint16 array, shape [R, 3 * C]
        Overwritten.
    scratch : uint16 array, shape [attention_scratch_bf16(T, C, heads)]
        Working space of one thread from the start of a cache line; its contents are lost.
    first, last : int
        Of ``sample * heads + head``: what is computed.
    """
    head = head_of(qkv, batch, heads)
    begin_blocks()
    for pair in range(first, last):
        row, column = pair // heads * head.context, pair % heads * head.size
        _backward_of_head(dout, qkv, out, lse[pair // heads, pair % heads], row, column, dqkv, scratch, head)
    end_blocks()
