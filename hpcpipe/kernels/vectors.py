"""Vectors of 16 lanes in LLVM's own terms, for what the compiler does not make of a loop."""

import math
from typing import Any

import numba.extending
from llvmlite import ir

from hpcpipe.kernels import features

# Kernels call what it decorates without the typing context, which numba passes.
intrinsic: Any = numba.extending.intrinsic

LANES = 16
I16, I32, I64, FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)
PAIRS = ir.VectorType(I16, 2 * LANES)


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


def declare(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Return the declaration of an LLVM intrinsic in the module that is built."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def splat(builder: Any, scalar: Any, vector: Any) -> Any:
    """Repeat a scalar in every lane of a vector type of 16 lanes."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(WORDS, [0] * LANES))


def constant(value: float) -> Any:
    """Return a vector of one float32."""
    return ir.Constant(FLOATS, [value] * LANES)


def place(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """Return a pointer to what lies a number of bytes behind an address."""
    return builder.inttoptr(builder.add(address, ir.Constant(I64, offset)), kind.as_pointer())


def load(builder: Any, address: Any, offset: int = 0) -> Any:
    """Load 16 float32."""
    return builder.load(place(builder, address, offset, FLOATS), align=4)


def store(builder: Any, values: Any, address: Any, offset: int = 0) -> None:
    """Store 16 float32."""
    builder.store(values, place(builder, address, offset, FLOATS), align=4)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute ``a * b + c``, rounded once."""
    return builder.call(declare(builder, "llvm.fma.v16f32", FLOATS, [FLOATS] * 3), [a, b, c])


def fold(builder: Any, rows: list[Any], combine: Any) -> Any:
    """Combine the lanes of each of 16 vectors, and return 16 results, in the order of the vectors.

    Lane i is combined with lane i + 8, what that gives with what lies 4 further, then 2 and 1: the same order in all.
    """
    for distance in (8, 4, 2, 1):
        # A vector holds the open lanes of several rows, `distance` of each at a time.
        near = [i for group in range(0, LANES, 2 * distance) for i in range(group, group + distance)]
        joined = ir.Constant(WORDS, [*near, *(LANES + i for i in near)])
        others = ir.Constant(WORDS, [i + distance for i in (*near, *(LANES + i for i in near))])
        rows = [
            combine(builder.shuffle_vector(first, second, joined), builder.shuffle_vector(first, second, others))
            for first, second in zip(rows[::2], rows[1::2], strict=True)
        ]
    return rows[0]


def widened(builder: Any, pairs: Any) -> tuple[Any, Any]:
    """Widen the even and the odd ones of 32 bfloat16: a bfloat16 is the upper half of a float32."""
    words = builder.bitcast(pairs, WORDS)
    even = builder.shl(words, ir.Constant(WORDS, [16] * LANES))
    odd = builder.and_(words, ir.Constant(WORDS, [-65536] * LANES))
    return builder.bitcast(even, FLOATS), builder.bitcast(odd, FLOATS)


def logarithm(builder: Any, x: Any) -> Any:
    """Compute the logarithm to base 2 of normal positive numbers, to 2e-7 of the result or of 1; NaN stays NaN."""
    # x is 2**exponent * mantissa, with a mantissa between the roots of 1/2 and of 2.
    root_of_half = ir.Constant(WORDS, [0x3F3504F3] * LANES)
    bits = builder.sub(builder.bitcast(x, WORDS), root_of_half)
    exponent = builder.sitofp(builder.ashr(bits, ir.Constant(WORDS, [23] * LANES)), FLOATS)
    fraction = builder.and_(bits, ir.Constant(WORDS, [0x7FFFFF] * LANES))
    mantissa = builder.bitcast(builder.add(fraction, root_of_half), FLOATS)
    # log(m) = 2 artanh((m - 1) / (m + 1)); the first term left out is below 1e-9.
    ratio = builder.fdiv(builder.fsub(mantissa, constant(1.0)), builder.fadd(mantissa, constant(1.0)))
    square, series = builder.fmul(ratio, ratio), constant(2 / 9 / math.log(2))
    for power in (7, 5, 3, 1):
        series = fma(builder, series, square, constant(2 / power / math.log(2)))
    return builder.select(builder.fcmp_ordered("==", x, x), fma(builder, series, ratio, exponent), x)


def rounded(builder: Any, low: Any, high: Any) -> Any:
    """Round twice 16 float32 to 32 bfloat16, to nearest even; where units for bfloat16 do it, subnormals become 0."""
    if features.has_bf16_unit():
        kind = ir.VectorType(BFloat(), 2 * LANES)
        convert = declare(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", kind, [FLOATS, FLOATS])
        return builder.bitcast(builder.call(convert, [high, low]), PAIRS)
    halves = []
    for values in (low, high):
        bits = builder.bitcast(values, WORDS)
        last = builder.and_(builder.lshr(bits, ir.Constant(WORDS, [16] * LANES)), ir.Constant(WORDS, [1] * LANES))
        nearest = builder.add(builder.add(bits, ir.Constant(WORDS, [0x7FFF] * LANES)), last)
        number = builder.fcmp_ordered("==", values, values)
        halves.append(builder.bitcast(builder.select(number, nearest, ir.Constant(WORDS, [0x7FC00000] * LANES)), PAIRS))
    odd = ir.Constant(ir.VectorType(I32, 2 * LANES), [2 * i + 1 for i in range(2 * LANES)])
    return builder.shuffle_vector(*halves, odd)
