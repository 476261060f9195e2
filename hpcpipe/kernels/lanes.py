"""Vectors of 16 float32 as values in kernels, where the order of a sum must not be left to the compiler.

A sum over a row in lanes has one order whatever the processor, whether it was compiled just now or loaded.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from hpcpipe.kernels import powers, vectors
from hpcpipe.kernels.vectors import FLOATS, I16, I32, LANES, PAIRS, WORDS, place


class _Vector(types.Type):
    """Numba's type of 16 float32."""

    def __init__(self) -> None:
        super().__init__("vector of 16 float32")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    """A vector is kept in one register, or in several where they are shorter."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)  # type: ignore[no-untyped-call]


_VECTOR = _Vector()


def _operation(emit: Callable[..., Any], result: Any, *arguments: Any) -> Any:
    """Make an intrinsic: emit gets the builder and the arguments."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return emit(builder, *values) or context.get_dummy_value()

    # Numba counts the arguments.
    def one(typing: Any, a: Any) -> Any:
        return result(*arguments), generate

    def two(typing: Any, a: Any, b: Any) -> Any:
        return result(*arguments), generate

    def three(typing: Any, a: Any, b: Any, c: Any) -> Any:
        return result(*arguments), generate

    return intrinsic((one, two, three)[len(arguments) - 1])


def _widen(builder: Any, address: Any) -> Any:
    bits = builder.load(place(builder, address, 0, ir.VectorType(I16, LANES)), align=2)
    words = builder.shl(builder.zext(bits, WORDS), ir.Constant(WORDS, [16] * LANES))
    return builder.bitcast(words, FLOATS)


def _round_two(builder: Any, low: Any, high: Any, address: Any) -> None:
    builder.store(vectors.rounded(builder, low, high), place(builder, address, 0, PAIRS), align=2)


def _sum(builder: Any, values: Any) -> Any:
    for size in (8, 4, 2, 1):
        halves = (list(range(first, first + size)) for first in (0, size))
        low, high = (
            builder.shuffle_vector(values, values, ir.Constant(ir.VectorType(I32, size), lanes)) for lanes in halves
        )
        values = builder.fadd(low, high)
    return builder.extract_element(values, ir.Constant(I32, 0))


splat = _operation(lambda builder, x: vectors.splat(builder, x, FLOATS), _VECTOR, types.float32)
"""Return a float32 in every lane."""
load = _operation(lambda builder, address: vectors.load(builder, address), _VECTOR, types.int64)
"""Return the 16 float32 at an address."""
store = _operation(vectors.store, types.void, _VECTOR, types.int64)
"""Store a vector at an address."""
widen = _operation(_widen, _VECTOR, types.int64)
"""Return the 16 bfloat16 at an address."""
round_two = _operation(_round_two, types.void, _VECTOR, _VECTOR, types.int64)
"""Store two vectors at an address as 32 bfloat16."""
add = _operation(lambda builder, a, b: builder.fadd(a, b), _VECTOR, _VECTOR, _VECTOR)
subtract = _operation(lambda builder, a, b: builder.fsub(a, b), _VECTOR, _VECTOR, _VECTOR)
multiply = _operation(lambda builder, a, b: builder.fmul(a, b), _VECTOR, _VECTOR, _VECTOR)
fma = _operation(vectors.fma, _VECTOR, _VECTOR, _VECTOR, _VECTOR)
"""Return a * b + c, rounded once."""
short_exponential = _operation(powers.short_exponential, _VECTOR, _VECTOR)
"""Return e**x for what is rounded to bfloat16 (`hpcpipe.kernels.powers`)."""
total = _operation(_sum, types.float32, _VECTOR)
"""Return the sum of the lanes: halves are added to halves, down to one."""
