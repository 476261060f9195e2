"""What is done to a row of a block when its product is complete: 32 float32 become 32 bfloat16.

Arguments are addresses: of the row in the block, of what is combined with it, of what is overwritten. The tile units
finish a row of 32 sums over 768 of k in 50 cycles, so this must take less. GELU and its derivative have the error
bounds of `hpcpipe.kernels.gelu`, which does the same with one value.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hpcpipe.kernels import features
from hpcpipe.kernels.gelu import CUBIC, FAR, SCALE
from hpcpipe.kernels.powers import LOG2_E, SHORT, power_of_two
from hpcpipe.kernels.vectors import (
    FLOATS,
    I16,
    LANES,
    PAIRS,
    WORDS,
    constant,
    declare,
    fma,
    load,
    place,
    rounded,
    store,
    widened,
)

_HALF_ROW = 64


def _reciprocal(builder: Any, x: Any) -> Any:
    """Compute 1 / x for x between 1 and 2**125, off by at most 2**-22 of itself."""
    if not features.has_vectors_of_64_bytes():
        return builder.fdiv(constant(1.0), x)
    # An estimate to 14 bits and one step of Newton's iteration take half the time of a division.
    kinds = [FLOATS, FLOATS, ir.IntType(LANES)]
    estimate = builder.call(
        declare(builder, "llvm.x86.avx512.rcp14.ps.512", FLOATS, kinds),
        [x, constant(0.0), ir.Constant(ir.IntType(LANES), -1)],
    )
    return builder.fmul(estimate, fma(builder, builder.fneg(x), estimate, constant(2.0)))


def _bounds(builder: Any, x: Any) -> tuple[Any, Any]:
    """Return x moved up to -`FAR`, and that moved down to `FAR`; NaN stays NaN."""
    above = builder.select(builder.fcmp_ordered("<", x, constant(-FAR)), constant(-FAR), x)
    return above, builder.select(builder.fcmp_ordered(">", above, constant(FAR)), constant(FAR), above)


def _sigmoid(builder: Any, x: Any, square: Any) -> Any:
    """Compute ``1 / (1 + exp(-2 * u))``, u as in `hpcpipe.kernels.gelu`, for x between -`FAR` and `FAR`."""
    inner = fma(builder, square, constant(-SCALE * LOG2_E * CUBIC), constant(-SCALE * LOG2_E))
    return _reciprocal(builder, builder.fadd(power_of_two(builder, builder.fmul(x, inner), SHORT), constant(1.0)))


def _gelu(builder: Any, x: Any) -> Any:
    x, bounded = _bounds(builder, x)
    return builder.fmul(x, _sigmoid(builder, bounded, builder.fmul(bounded, bounded)))


def _gelu_slope(builder: Any, x: Any) -> Any:
    _, x = _bounds(builder, x)
    square = builder.fmul(x, x)
    sigmoid = _sigmoid(builder, x, square)
    slope = builder.fmul(x, fma(builder, square, constant(3 * CUBIC * SCALE), constant(SCALE)))
    rest = builder.fmul(slope, builder.fsub(constant(1.0), sigmoid))
    return fma(builder, rest, sigmoid, sigmoid)


def _store_pairs(builder: Any, pairs: Any, address: Any) -> None:
    builder.store(pairs, place(builder, address, 0, PAIRS), align=2)


@intrinsic
def _round_row(typing: Any, row: Any, target: Any) -> Any:
    """Store a row rounded."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, target = arguments
        _store_pairs(builder, rounded(builder, load(builder, row), load(builder, row, _HALF_ROW)), target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


def _with_bias(builder: Any, row: Any, bias: Any) -> Any:
    """Return the rounded sum of a row and a float32 bias."""
    sums = [builder.fadd(load(builder, row, half), load(builder, bias, half)) for half in (0, _HALF_ROW)]
    return rounded(builder, *sums)


@intrinsic
def _bias_row(typing: Any, row: Any, bias: Any, target: Any) -> Any:
    """Store the sum of a row and a bias, rounded."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, bias, target = arguments
        _store_pairs(builder, _with_bias(builder, row, bias), target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def _gelu_row(typing: Any, row: Any, bias: Any, hidden: Any, activated: Any) -> Any:
    """Store the sum of a row and a bias, rounded, and GELU of what is stored, rounded."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, bias, hidden, activated = arguments
        pairs = _with_bias(builder, row, bias)
        _store_pairs(builder, pairs, hidden)
        even, odd = (_gelu(builder, values) for values in widened(builder, pairs))
        order = [lane // 2 + LANES * (lane % 2) for lane in range(2 * LANES)]
        apart = rounded(builder, even, odd)
        undefined = ir.Constant(PAIRS, ir.Undefined)
        zipped = builder.shuffle_vector(apart, undefined, ir.Constant(ir.VectorType(ir.IntType(32), 2 * LANES), order))
        _store_pairs(builder, zipped, activated)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@intrinsic
def _gelu_slope_row(typing: Any, row: Any, hidden: Any, target: Any) -> Any:
    """Store the product of a row and the derivative of GELU at `hidden`, rounded."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, hidden, target = arguments
        half_pairs = ir.VectorType(I16, LANES)
        products = []
        for half in range(2):
            bits = builder.load(place(builder, hidden, half * 2 * LANES, half_pairs), align=2)
            words = builder.shl(builder.zext(bits, WORDS), ir.Constant(WORDS, [16] * LANES))
            slope = _gelu_slope(builder, builder.bitcast(words, FLOATS))
            products.append(builder.fmul(load(builder, row, half * _HALF_ROW), slope))
        _store_pairs(builder, rounded(builder, *products), target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def _residual_row(typing: Any, row: Any, bias: Any, residual: Any, target: Any) -> Any:
    """Store, in float32, the sum of a row and a bias, added to 32 float32 of the residual stream."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, bias, residual, target = arguments
        for half in (0, _HALF_ROW):
            shifted = builder.fadd(load(builder, row, half), load(builder, bias, half))
            store(builder, builder.fadd(load(builder, residual, half), shifted), target, half)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@intrinsic
def _add_row(typing: Any, row: Any, target: Any) -> Any:
    """Add a row to 32 float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, target = arguments
        for half in (0, _HALF_ROW):
            store(builder, builder.fadd(load(builder, target, half), load(builder, row, half)), target, half)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


# Kernels call intrinsics without the argument that numba passes to them.
round_row: Any = _round_row
bias_row: Any = _bias_row
gelu_row: Any = _gelu_row
gelu_slope_row: Any = _gelu_slope_row
residual_row: Any = _residual_row
add_row: Any = _add_row
