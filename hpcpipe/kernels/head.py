"""The product with the vocabulary, and cross-entropy of bfloat16 logits with a coefficient per row.

Shapes: R rows, C width, V vocabulary, P at least V rounded up to 32. Probabilities are those of the logits as they are
stored, rounded: so the gradient is that of the loss. A row's coefficient is its weight in the loss, as in
`hpcpipe.kernels.loss`.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hpcpipe.kernels import lanes
from hpcpipe.kernels.arrays import BFloats, Floats, Panels, Tokens
from hpcpipe.kernels.bfloat16 import round_bits, widen
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
from hpcpipe.kernels.powers import exponential
from hpcpipe.kernels.vectors import (
    FLOAT,
    FLOATS,
    LANES,
    PAIRS,
    constant,
    declare,
    load,
    place,
    rounded,
    splat,
    store,
    widened,
)

_LEFT_BYTES = 1 << 19  # of the left operand, which stay in the second-level cache while the table streams past
_LOWEST = np.float32(-3.4e38)
# How far a logit may lie above the highest one that is known: sums of exponentials stay far below overflow.
_LEEWAY = 16.0


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def _finish_row(typing: Any, row: Any, target: Any, highest: Any, total: Any) -> Any:
    """Store a row of 32 logits as bfloat16, and add the exponentials of the rounded ones to the lanes of its sum.

    They are relative to a logit that is not far below the highest: it is replaced, and the sum rescaled, only where
    one lies much higher. So most rows need no maximum. Arguments are addresses.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, target, highest, total = arguments
        pairs = rounded(builder, load(builder, row), load(builder, row, 64))
        builder.store(pairs, place(builder, target, 0, PAIRS), align=2)
        even, odd = widened(builder, pairs)
        known = place(builder, highest, 0, FLOAT)
        before = splat(builder, builder.load(known, align=4), FLOATS)
        limit = builder.fadd(before, constant(_LEEWAY))
        above = builder.or_(builder.fcmp_ordered(">", even, limit), builder.fcmp_ordered(">", odd, limit))
        above = builder.icmp_unsigned(
            "!=", builder.bitcast(above, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0)
        )
        with builder.if_then(above, likely=False):
            largest = declare(builder, "llvm.vector.reduce.fmax.v16f32", FLOAT, [FLOATS])
            new = builder.call(largest, [_larger(builder, even, odd)])
            builder.store(new, known, align=4)
            factor = exponential(builder, builder.fsub(before, splat(builder, new, FLOATS)))
            store(builder, builder.fmul(load(builder, total), factor), total)
        reference = splat(builder, builder.load(known, align=4), FLOATS)
        terms = [exponential(builder, builder.fsub(values, reference)) for values in (even, odd)]
        store(builder, builder.fadd(load(builder, total), builder.fadd(*terms)), total)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), emit


# Kernels call intrinsics without the argument that numba passes to them.
_finish: Any = _finish_row


@kernel
def head_logits(
    a: BFloats,
    table: Panels,
    vocab: int,
    logits: BFloats,
    highest: Floats,
    total: Floats,
    first: int,
    last: int,
) -> None:
    """Compute ``logits = a @ table.T`` and the sum of their exponentials, while they are in cache.

    A sum is off by at most 2**-20 of itself. It depends on the row alone, not on the rows that are computed with it.

    Parameters
    ----------
    a : uint16 array, shape [R, C]
        Left operand (`hpcpipe.kernels.products` says how far beyond it may be read).
    table : uint16 array, shape [panel_elements(C, V)]
        Packed columns.
    vocab : int
        V.
    logits : uint16 array, shape [R, P]
        Overwritten in the rows ``first`` to ``last``: columns to V with the logits, the others to the next multiple
        of 32 with zero, and none behind.
    highest : float32 array, shape [R]
        Overwritten likewise with what the exponentials of a row are relative to.
    total : float32 array, shape [R, 16]
        Overwritten likewise with parts of the sum of ``exp(logit - highest)``.
    first, last : int
        Rows; the first is a multiple of 32, and so is the last unless it is R.
    """
    steps = (a.shape[1] + DEPTH - 1) // DEPTH
    block = carray(new_block(), (ROWS, COLUMNS))
    at_once = max(_LEFT_BYTES // (steps * DEPTH * 2) // ROWS * ROWS, ROWS)
    highest[first:last] = _LOWEST
    total[first:last] = 0
    begin_blocks()
    for top in range(first, last, at_once):
        for column in range(0, vocab, COLUMNS):
            panel = table.ctypes.data + (column // COLUMNS) * steps * PANEL_STEP_BYTES
            for row in range(top, min(top + at_once, last), ROWS):
                rows = min(ROWS, last - row)
                left = a.ctypes.data + row * a.strides[0]
                multiply_block(left, a.strides[0], panel, steps, block.ctypes.data, False)
                if column + COLUMNS > vocab:
                    block[:rows, vocab - column :] = -np.inf
                for r in range(rows):
                    _finish(
                        block.ctypes.data + r * COLUMNS * 4,
                        logits.ctypes.data + (row + r) * logits.strides[0] + column * 2,
                        highest.ctypes.data + (row + r) * 4,
                        total.ctypes.data + (row + r) * LANES * 4,
                    )
                if column + COLUMNS > vocab:
                    logits[row : row + rows, vocab : column + COLUMNS] = 0
    end_blocks()


@kernel
def cross_entropy_forward_bf16(
    logits: BFloats, targets: Tokens, coefficients: Floats, highest: Floats, total: Floats, lse: Floats
) -> float:
    """Sum ``-coefficient * log(softmax(logits)[target])`` over the rows, in float64 from row 0 upwards.

    Parameters
    ----------
    logits : uint16 array, shape [R, P]
        Scores of each token.
    targets : int32 array, shape [R]
        The right token; anything where the coefficient is zero.
    coefficients : float32 array, shape [R]
        Weight of each row; a row of weight zero adds exactly nothing.
    highest, total : float32 array, shape [R] and [R, 16]
        What `head_logits` stored.
    lse : float32 array, shape [R]
        Overwritten with the logarithm of the sum of the exponentials of each row, which the backward takes.

    Returns
    -------
    float
        The sum; the logarithm of each row is off by at most 2**-20 absolutely.
    """
    loss = 0.0
    for row in range(targets.shape[0]):
        row_total = 0.0
        for lane in range(LANES):
            row_total += np.float64(total[row, lane])
        log_total = math.log(row_total)
        lse[row] = np.float64(highest[row]) + log_total
        if coefficients[row] != 0:
            distance = np.float64(highest[row]) - np.float64(widen(logits[row, targets[row]]))
            loss += np.float64(coefficients[row]) * (distance + log_total)
    return loss


@kernel
def cross_entropy_backward_bf16(
    logits: BFloats,
    vocab: int,
    targets: Tokens,
    coefficients: Floats,
    lse: Floats,
    gradient: BFloats,
    first: int,
    last: int,
) -> None:
    """Compute ``gradient = coefficient * (softmax(logits) - onehot(target))``, rounded.

    Before it is rounded, an element is off by at most ``2**-17 + 2**-24 * (|logit| + |lse|)`` of itself, that of the
    target by 2**-22; where the probability is below 2**-126, it may be zero.

    Parameters
    ----------
    logits : uint16 array, shape [R, P]
        Scores of each token.
    vocab : int
        V.
    targets : int32 array, shape [R]
        The right token; anything where the coefficient is zero.
    coefficients : float32 array, shape [R]
        Weight of each row; a row of weight zero gets exact zeros.
    lse : float32 array, shape [R]
        What the forward stored.
    gradient : uint16 array, shape [R, P]
        Overwritten in the rows ``first`` to ``last``: columns to V, and the others to the next multiple of 32 with
        zero, for products read them. May be ``logits``.
    first, last : int
        Rows; threads may share them in any way.
    """
    padded = (vocab + COLUMNS - 1) // COLUMNS * COLUMNS
    for row in range(first, last):
        coefficient = coefficients[row]
        if coefficient == 0:
            gradient[row, :padded] = 0
            continue
        target, row_lse = targets[row], lse[row]
        # By itself, in float64: where the probability is near 1, what is left is the error of the exponential.
        distance = np.float64(widen(logits[row, target])) - np.float64(row_lse)
        of_target = np.float32(np.float64(coefficient) * math.expm1(distance))
        source = logits.ctypes.data + row * logits.strides[0]
        to = gradient.ctypes.data + row * gradient.strides[0]
        factor, shift = lanes.splat(coefficient), lanes.splat(row_lse)
        for offset in range(0, padded * 2, COLUMNS * 2):
            low = lanes.subtract(lanes.widen(source + offset), shift)
            high = lanes.subtract(lanes.widen(source + offset + LANES * 2), shift)
            lanes.round_two(
                lanes.multiply(lanes.short_exponential(low), factor),
                lanes.multiply(lanes.short_exponential(high), factor),
                to + offset,
            )
        gradient[row, vocab:padded] = 0
        gradient[row, target] = np.uint16(round_bits(of_target))
