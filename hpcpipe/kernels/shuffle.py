"""Transposition in registers, which the compiler does not find by itself."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hpcpipe.kernels.vectors import load, rounded

_LANES = 16
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LINE, _PAIRS, _WORDS = ir.VectorType(_I16, _LANES), ir.VectorType(_I16, 2 * _LANES), ir.VectorType(_I32, _LANES)


def _transpose(builder: Any, rows: list[Any]) -> None:
    """Transpose 16 vectors of 16 words in place."""
    # Blocks of 1, 2, 4 and then 8 lanes change places across the diagonal.
    for size in (1, 2, 4, 8):
        upper = [lane if not lane & size else lane - size + _LANES for lane in range(_LANES)]
        lower = [lane + size if not lane & size else lane + _LANES for lane in range(_LANES)]
        for i in range(_LANES):
            if not i & size:
                first, second = rows[i], rows[i + size]
                rows[i] = builder.shuffle_vector(first, second, ir.Constant(_WORDS, upper))
                rows[i + size] = builder.shuffle_vector(first, second, ir.Constant(_WORDS, lower))


@intrinsic
def _transpose_pairs(typing: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
    """Transpose 32 rows of 16 two-byte elements to 16 rows of 32; addresses and strides are in bytes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_stride, target, target_stride = arguments

        def line(row: int) -> Any:
            address = builder.add(source, builder.mul(source_stride, ir.Constant(_I64, row)))
            return builder.load(builder.inttoptr(address, _LINE.as_pointer()), align=2)

        zipped = ir.Constant(ir.VectorType(_I32, 2 * _LANES), [i // 2 + _LANES * (i % 2) for i in range(2 * _LANES)])
        rows = [
            builder.bitcast(builder.shuffle_vector(line(row), line(row + 1), zipped), _WORDS)
            for row in range(0, 2 * _LANES, 2)
        ]
        _transpose(builder, rows)
        for index, words in enumerate(rows):
            address = builder.add(target, builder.mul(target_stride, ir.Constant(_I64, index)))
            builder.store(words, builder.inttoptr(address, _WORDS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), emit


@intrinsic
def _transpose_words(typing: Any, source: Any, source_stride: Any, target: Any) -> Any:
    """Transpose 16 rows of 32 two-byte elements to 16 lines of a panel, of which each has a pair of every row."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_stride, target = arguments
        rows = []
        for row in range(_LANES):
            address = builder.add(source, builder.mul(source_stride, ir.Constant(_I64, row)))
            rows.append(builder.load(builder.inttoptr(address, _WORDS.as_pointer()), align=2))
        _transpose(builder, rows)
        for index, words in enumerate(rows):
            address = builder.add(target, ir.Constant(_I64, index * 64))
            builder.store(words, builder.inttoptr(address, _WORDS.as_pointer()), align=64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def _zip_rows(typing: Any, source: Any, source_stride: Any, target: Any) -> Any:
    """Pack 32 rows of 32 two-byte elements as a panel has them: pairs of rows, 16 columns and then the other 16."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_stride, target = arguments

        def line(row: int) -> Any:
            address = builder.add(source, builder.mul(source_stride, ir.Constant(_I64, row)))
            return builder.load(builder.inttoptr(address, _PAIRS.as_pointer()), align=2)

        for pair in range(_LANES):
            low, high = line(2 * pair), line(2 * pair + 1)
            for half in range(2):
                first = half * _LANES
                zipped = [first + i // 2 + 2 * _LANES * (i % 2) for i in range(2 * _LANES)]
                words = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 2 * _LANES), zipped))
                address = builder.add(target, ir.Constant(_I64, half * 1024 + pair * 64))
                builder.store(words, builder.inttoptr(address, _PAIRS.as_pointer()), align=64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


def _store_line(builder: Any, words: Any, target: Any, offset: int, past_caches: bool) -> None:
    """Store a line of a panel; past the caches it is not read first, and pushes nothing out of them."""
    address = builder.inttoptr(builder.add(target, ir.Constant(_I64, offset)), words.type.as_pointer())
    stored = builder.store(words, address, align=64 if past_caches else 4)
    if past_caches:
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))


def _transposed_floats(past_caches: bool) -> Any:
    """Make the intrinsic that rounds 16 rows of 32 float32 and transposes them as `_transpose_words` does."""

    @intrinsic
    def transpose_floats(typing: Any, source: Any, source_stride: Any, target: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, source_stride, target = arguments
            rows = []
            for row in range(_LANES):
                address = builder.add(source, builder.mul(source_stride, ir.Constant(_I64, row)))
                pairs = rounded(builder, load(builder, address), load(builder, address, 64))
                rows.append(builder.bitcast(pairs, _WORDS))
            _transpose(builder, rows)
            for index, words in enumerate(rows):
                _store_line(builder, words, target, index * 64, past_caches)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    return transpose_floats


def _zipped_floats(past_caches: bool) -> Any:
    """Make the intrinsic that rounds two rows of 32 float32 and packs them as `_zip_rows` does."""

    @intrinsic
    def zip_floats(typing: Any, low: Any, high: Any, target: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            low, high, target = arguments
            lanes = [i // 2 + _LANES * (i % 2) for i in range(2 * _LANES)]
            zipped = ir.Constant(ir.VectorType(_I32, 2 * _LANES), lanes)
            for half in range(2):
                apart = rounded(builder, load(builder, low, half * 64), load(builder, high, half * 64))
                words = builder.shuffle_vector(apart, ir.Constant(_PAIRS, ir.Undefined), zipped)
                _store_line(builder, words, target, half * 1024, past_caches)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    return zip_floats


@intrinsic
def _finish_stores(typing: Any) -> Any:
    """Let other threads see what was stored past the caches."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


# Kernels call intrinsics without the argument that numba passes to them.
transpose_pairs: Any = _transpose_pairs
transpose_words: Any = _transpose_words
zip_rows: Any = _zip_rows
transpose_floats, transpose_floats_past_caches = _transposed_floats(False), _transposed_floats(True)
zip_floats, zip_floats_past_caches = _zipped_floats(False), _zipped_floats(True)
finish_stores: Any = _finish_stores
