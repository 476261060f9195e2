"""One block of a bfloat16 product, which everything else is built of.

A block is 32 rows by 32 columns. The left operand is row-major with any stride; the right one is a panel of 32 columns
(`hpcpipe.kernels.panels`). Every element is one sum over k, of pairs of products, from the first pair to the last, in
float32, wherever the element lies: so bits do not depend on how a product is cut into blocks.
"""

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hpcpipe.kernels import amx, features
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.vectors import FLOAT, FLOATS, I32, I64, LANES, WORDS, BFloat, declare, splat

ROWS = 32
COLUMNS = 32
DEPTH = 32
PANEL_STEP_BYTES = DEPTH * COLUMNS * 2
"""What a panel holds for each 32 of k."""
ROW_BYTES = COLUMNS * 4
"""Of a row of a block."""
BLOCK_ELEMENTS = ROWS * COLUMNS


def _dot_pairs(builder: Any, sums: list[list[Any]], pairs: list[Any], panel: list[Any]) -> list[list[Any]]:
    """Add the products of a pair of k with AVX-512's own dot product of bfloat16 pairs."""
    operands = ir.VectorType(BFloat(), 2 * LANES)
    dot = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, operands, operands])
    right = [builder.bitcast(words, operands) for words in panel]
    result = []
    for row, pair in zip(sums, pairs, strict=True):
        left = builder.bitcast(splat(builder, pair, WORDS), operands)
        result.append([builder.call(dot, [total, left, words]) for total, words in zip(row, right, strict=True)])
    return result


def _widened_pairs(builder: Any, sums: list[list[Any]], pairs: list[Any], panel: list[Any]) -> list[list[Any]]:
    """Add the products of a pair of k in float32, the even k first: a bfloat16 is the upper half of a float32."""
    fma = declare(builder, "llvm.fma.v16f32", FLOATS, [FLOATS] * 3)
    upper, shift = ir.Constant(WORDS, [-65536] * LANES), ir.Constant(WORDS, [16] * LANES)
    even = [builder.bitcast(builder.shl(words, shift), FLOATS) for words in panel]
    odd = [builder.bitcast(builder.and_(words, upper), FLOATS) for words in panel]
    result = []
    for row, pair in zip(sums, pairs, strict=True):
        low = splat(builder, builder.bitcast(builder.shl(pair, ir.Constant(I32, 16)), FLOAT), FLOATS)
        high = splat(builder, builder.bitcast(builder.and_(pair, ir.Constant(I32, -65536)), FLOAT), FLOATS)
        new = [builder.call(fma, [low, words, total]) for total, words in zip(row, even, strict=True)]
        result.append([builder.call(fma, [high, words, total]) for total, words in zip(new, odd, strict=True)])
    return result


def _at(builder: Any, address: Any, offset: Any, type_: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), type_.as_pointer())


def _strip(rows: int, halves: int, add_pairs: Any) -> Any:
    """Make the intrinsic that computes `rows` rows by ``16 * halves`` columns, its sums in registers."""

    @intrinsic
    def strip(typing: Any, a: Any, a_stride: Any, b: Any, num_k32: Any, out: Any, accumulate: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_stride, b, num_k32, out, accumulate = arguments
            constant = [ir.Constant(I64, n) for n in range(rows)]
            places = [
                [
                    _at(builder, out, ir.Constant(I64, row * COLUMNS * 4 + half * LANES * 4), FLOATS)
                    for half in range(halves)
                ]
                for row in range(rows)
            ]
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            start = [
                [builder.select(accumulate, builder.load(place, align=64), zero) for place in row] for row in places
            ]
            lines = [builder.add(a, builder.mul(a_stride, constant[row])) for row in range(rows)]
            num_pairs = builder.mul(num_k32, ir.Constant(I64, DEPTH // 2))
            before = builder.block
            loop, after = builder.append_basic_block("pairs"), builder.append_basic_block("stored")
            builder.branch(loop)
            builder.position_at_end(loop)
            pair = builder.phi(I64)
            pair.add_incoming(constant[0], before)
            sums = [[builder.phi(FLOATS) for _ in range(halves)] for _ in range(rows)]
            # Within 32 of k, a panel has the 16 pairs of its first 16 columns, then those of the others.
            step = builder.lshr(pair, ir.Constant(I64, 4))
            words = builder.add(builder.shl(pair, ir.Constant(I64, 6)), builder.shl(step, ir.Constant(I64, 10)))
            panel = [
                builder.load(_at(builder, b, builder.add(words, ir.Constant(I64, half * 1024)), WORDS), align=64)
                for half in range(halves)
            ]
            offset = builder.shl(pair, ir.Constant(I64, 2))
            pairs = [builder.load(_at(builder, line, offset, I32), align=2) for line in lines]
            new = add_pairs(builder, sums, pairs, panel)
            following = builder.add(pair, ir.Constant(I64, 1))
            end = builder.block
            pair.add_incoming(following, end)
            for row in range(rows):
                for half in range(halves):
                    sums[row][half].add_incoming(start[row][half], before)
                    sums[row][half].add_incoming(new[row][half], end)
            builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
            builder.position_at_end(after)
            for row in range(rows):
                for half in range(halves):
                    builder.store(new[row][half], places[row][half], align=64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.boolean), emit

    return strip


_wide = features.has_vectors_of_64_bytes()
_STRIP_ROWS, _STRIP_HALVES = (8, 2) if _wide else (4, 1)
_strip_product = _strip(
    _STRIP_ROWS, _STRIP_HALVES, _dot_pairs if features.family() == "avx512_bf16" else _widened_pairs
)


@kernel
def _multiply_block(a: int, a_stride: int, b: int, num_k32: int, out: int, accumulate: bool) -> None:
    """Multiply 32 rows by a panel of 32 columns.

    Parameters
    ----------
    a : int
        Address of the left operand: 32 rows of bfloat16, of which ``32 * num_k32`` elements are read.
    a_stride : int
        Bytes from one of its rows to the next.
    b : int
        Address of the panel, at the first 32 of k to be used; starts a cache line.
    num_k32 : int
        At least 1: k runs over so many times 32.
    out : int
        Address of the block: float32, 32 x 32, one row behind the other; starts a cache line.
    accumulate : bool
        Whether the sum goes on from what the block holds, or starts from zero.
    """
    for row in range(0, ROWS, _STRIP_ROWS):
        for half in range(0, 2, _STRIP_HALVES):
            _strip_product(
                a + row * a_stride,
                a_stride,
                b + half * 1024,
                num_k32,
                out + row * COLUMNS * 4 + half * 64,
                accumulate,
            )


@kernel
def _begin_blocks() -> None:
    """Prepare this thread's units for `multiply_block`; `end_blocks` follows in the same kernel."""


@kernel
def _end_blocks() -> None:
    """Give the units back."""


_has_tiles = features.family() == "amx"
multiply_block = amx.multiply_block if _has_tiles else _multiply_block
begin_blocks = amx.begin if _has_tiles else _begin_blocks
end_blocks = amx.end if _has_tiles else _end_blocks


@intrinsic
def _new_block(typing: Any) -> Any:
    """Return a pointer to a block of the calling kernel's own stack: 1024 float32 from the start of a cache line."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            block = builder.alloca(ir.ArrayType(FLOAT, BLOCK_ELEMENTS), name="block")
            block.align = 64
        return builder.bitcast(block, FLOAT.as_pointer())

    return types.CPointer(types.float32)(), emit


# Kernels call intrinsics without the argument that numba passes to them.
new_block: Any = _new_block
# numba has no types for the names that it exports.
carray: Any = numba.carray  # type: ignore[attr-defined]
