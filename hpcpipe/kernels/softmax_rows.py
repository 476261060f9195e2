"""What softmax and attention do to 32 float32 in a row, as vector instructions.

Arguments are addresses. A vector of lanes is 16 float32, in which sums and maxima are kept until a row is complete.
"""

import math
from typing import Any

from llvmlite import ir
from numba import types

from hpcpipe.kernels.powers import LONG, power_of_two
from hpcpipe.kernels.vectors import (
    FLOAT,
    FLOATS,
    I16,
    I32,
    I64,
    LANES,
    PAIRS,
    WORDS,
    constant,
    declare,
    fma,
    fold,
    intrinsic,
    load,
    logarithm,
    place,
    rounded,
    splat,
    store,
    widened,
)

LANE_BYTES = 64
"""Of a vector of lanes."""
_LOWEST = -126.0


def _power_of_two(builder: Any, x: Any) -> Any:
    """Compute 2**x for x <= 127; below -126 it is zero, and NaN stays NaN."""
    low = builder.fcmp_ordered("<", x, constant(_LOWEST))
    return builder.select(low, constant(0.0), power_of_two(builder, x, LONG))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _scalar(builder: Any, address: Any) -> Any:
    """Load one float32 into all lanes."""
    return splat(builder, builder.load(place(builder, address, 0, FLOAT), align=4), FLOATS)


def _visible(builder: Any, half: int, first: Any, last: Any) -> Any:
    """Tell of 16 of a row's 32 columns whether they are from `first` to before `last`."""
    length = splat(builder, builder.trunc(builder.sub(last, first), I32), WORDS)
    first = splat(builder, builder.trunc(first, I32), WORDS)
    columns = ir.Constant(WORDS, [half * LANES + lane for lane in range(LANES)])
    return builder.icmp_unsigned("<", builder.sub(columns, first), length)


@intrinsic
def larger_lanes(typing: Any, row: Any, last: Any, maxima: Any) -> Any:
    """Raise the lanes of a maximum to a row's columns before `last`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, last, maxima = arguments
        highest = load(builder, maxima)
        for half in range(2):
            visible = _visible(builder, half, ir.Constant(I64, 0), last)
            score = builder.select(visible, load(builder, row, half * LANE_BYTES), constant(-math.inf))
            highest = _larger(builder, score, highest)
        store(builder, highest, maxima)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def exponentials_of_row(typing: Any, row: Any, last: Any, factor: Any, shift: Any, target: Any, sums: Any) -> Any:
    """Store ``2**(factor * (row - shift))`` as bfloat16, zero from `last`; add it, unrounded, to a sum's lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, last, factor, shift, target, sums = arguments
        factor, shift = splat(builder, factor, FLOATS), _scalar(builder, shift)
        values = []
        for half in range(2):
            difference = builder.fsub(load(builder, row, half * LANE_BYTES), shift)
            power = _power_of_two(builder, builder.fmul(difference, factor))
            visible = _visible(builder, half, ir.Constant(I64, 0), last)
            values.append(builder.select(visible, power, constant(0.0)))
        store(builder, builder.fadd(load(builder, sums), builder.fadd(*values)), sums)
        builder.store(rounded(builder, *values), place(builder, target, 0, PAIRS), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, types.int64, types.int64), emit


@intrinsic
def gradient_of_row(
    typing: Any,
    row: Any,
    slopes: Any,
    first: Any,
    factor: Any,
    scale: Any,
    lse: Any,
    projections: Any,
    target: Any,
    slope_target: Any,
) -> Any:
    """Store probabilities and the gradient of scores as bfloat16, for one key and 32 queries; zero before `first`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, slopes, first, factor, scale, lse, projections, target, slope_target = arguments
        factor, scale, zero = splat(builder, factor, FLOATS), splat(builder, scale, FLOATS), constant(0.0)
        probabilities, gradients = [], []
        for half in range(2):
            offset = half * LANE_BYTES
            shift = builder.fneg(load(builder, lse, offset))
            exponent = fma(builder, load(builder, row, offset), factor, shift)
            # Where scores are so large that rounding alone lifts it above zero.
            exponent = builder.select(builder.fcmp_ordered(">", exponent, zero), zero, exponent)
            probability = _power_of_two(builder, exponent)
            difference = builder.fsub(load(builder, slopes, offset), load(builder, projections, offset))
            gradient = builder.fmul(builder.fmul(probability, scale), difference)
            visible = _visible(builder, half, first, ir.Constant(I64, 2 * LANES))
            probabilities.append(builder.select(visible, probability, zero))
            gradients.append(builder.select(visible, gradient, zero))
        builder.store(rounded(builder, *probabilities), place(builder, target, 0, PAIRS), align=2)
        builder.store(rounded(builder, *gradients), place(builder, slope_target, 0, PAIRS), align=2)
        return context.get_dummy_value()

    addresses = (types.int64, types.int64)
    return types.void(*addresses, types.int64, types.float32, types.float32, *addresses, *addresses), emit


@intrinsic
def add_products(typing: Any, a: Any, b: Any, sums: Any) -> Any:
    """Add the products of 32 pairs of bfloat16 to the lanes of a sum."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, sums = arguments
        left, right = (widened(builder, builder.load(place(builder, x, 0, PAIRS), align=2)) for x in (a, b))
        total = load(builder, sums)
        for x, y in zip(left, right, strict=True):
            total = fma(builder, x, y, total)
        store(builder, total, sums)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def fill_lanes(typing: Any, lanes: Any, value: Any) -> Any:
    """Put one value into 16 lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes, value = arguments
        store(builder, splat(builder, value, FLOATS), lanes)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), emit


def _load_lanes(builder: Any, lanes: Any) -> list[Any]:
    return [load(builder, lanes, row * LANE_BYTES) for row in range(LANES)]


@intrinsic
def maxima_of_lanes(typing: Any, lanes: Any, out: Any) -> Any:
    """Store the largest lane of each of 16 rows."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes, out = arguments
        store(builder, fold(builder, _load_lanes(builder, lanes), lambda a, b: _larger(builder, a, b)), out)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def sums_of_lanes(typing: Any, lanes: Any, out: Any) -> Any:
    """Store the sum of the lanes of each of 16 rows."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes, out = arguments
        store(builder, fold(builder, _load_lanes(builder, lanes), builder.fadd), out)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def finish_sums(typing: Any, lanes: Any, scale: Any, shifts: Any, inverse: Any, lse: Any) -> Any:
    """Store, for each of 16 rows of exponentials, 1 / sum and ``scale * shift + log(sum)``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes, scale, shifts, inverse, lse = arguments
        total = fold(builder, _load_lanes(builder, lanes), builder.fadd)
        store(builder, builder.fdiv(constant(1.0), total), inverse)
        logarithms = builder.fmul(logarithm(builder, total), constant(math.log(2)))
        store(builder, fma(builder, load(builder, shifts), splat(builder, scale, FLOATS), logarithms), lse)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64, types.int64), emit


@intrinsic
def round_row(typing: Any, row: Any, factor: Any, target: Any, width: Any) -> Any:
    """Store the first elements of ``factor * row`` as bfloat16."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, factor, target, width = arguments
        factor = splat(builder, factor, FLOATS)
        low, high = (builder.fmul(load(builder, row, offset), factor) for offset in (0, LANE_BYTES))
        columns = builder.insert_element(
            ir.Constant(PAIRS, ir.Undefined), builder.trunc(width, I16), ir.Constant(I32, 0)
        )
        first = ir.Constant(ir.VectorType(I32, 2 * LANES), [0] * (2 * LANES))
        columns = builder.shuffle_vector(columns, ir.Constant(PAIRS, ir.Undefined), first)
        inside = builder.icmp_signed("<", ir.Constant(PAIRS, list(range(2 * LANES))), columns)
        pointer = place(builder, target, 0, PAIRS)
        kinds = [PAIRS, pointer.type, I32, inside.type]
        masked = declare(builder, "llvm.masked.store.v32i16.p0", ir.VoidType(), kinds)
        builder.call(masked, [rounded(builder, low, high), pointer, ir.Constant(I32, 2), inside])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64), emit
