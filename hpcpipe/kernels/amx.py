"""Block products on the tile units of AMX, by way of LLVM's intrinsics for its instructions.

A block of 32 x 32 sums stays in four tiles of 16 x 16 float32 while the operands pass through four others. Nothing
here may be called unless `hpcpipe.kernels.features.family` is ``amx``: LLVM ends the process when it cannot compile an
instruction, and the processor when it does not know one.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcpipe.kernels.jit import kernel

_TILES, _TILE_ROWS, _ROW_BYTES = 8, 16, 64
_PALETTE_OF_8_KIB = 1
# The 64 bytes that ldtilecfg reads: palette, 15 bytes of zero, bytes per row of 16 tiles in uint16, rows of 16 tiles.
_CONFIGURATION = (
    bytes([_PALETTE_OF_8_KIB, *[0] * 15])
    + _ROW_BYTES.to_bytes(2, "little") * _TILES
    + bytes(16)
    + bytes([_TILE_ROWS] * _TILES + [0] * 8)
)

_I8, _I32, _I64, _VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.VoidType()
_POINTER = _I8.as_pointer()


def _call(builder: Any, name: str, *arguments: Any) -> None:
    """Call an LLVM intrinsic that returns nothing."""
    kinds = [argument.type for argument in arguments]
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(_VOID, kinds), name)
    builder.call(function, arguments)


def _on_tiles(name: str, *tiles: int) -> Any:
    """Make the intrinsic of an instruction whose operands are tiles: their numbers are part of the instruction."""

    @intrinsic
    def instruction(typing: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _call(builder, name, *(ir.Constant(_I8, tile) for tile in tiles))
            return context.get_dummy_value()

        return types.void(), emit

    return instruction


def _on_memory(name: str, tile: int) -> Any:
    """Make the intrinsic that moves a tile: (address of its first row, bytes from one row to the next)."""

    @intrinsic
    def instruction(typing: Any, address: Any, stride: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, stride = arguments
            _call(builder, name, ir.Constant(_I8, tile), builder.inttoptr(address, _POINTER), stride)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return instruction


@intrinsic
def _load_shapes(typing: Any) -> Any:
    """Shape all tiles of this thread as 16 rows of 64 bytes, and zero them."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        content = ir.Constant(ir.ArrayType(_I8, len(_CONFIGURATION)), bytearray(_CONFIGURATION))
        place = cgutils.global_constant(builder, "tile_configuration", content)
        _call(builder, "llvm.x86.ldtilecfg", builder.bitcast(place, _POINTER))
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def _prefetch_line(typing: Any, address: Any) -> Any:
    """Start to bring a cache line into L2. Any address will do: a prefetch never faults."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        read, near_l2, data = (ir.Constant(_I32, number) for number in (0, 2, 1))
        _call(builder, "llvm.prefetch.p0", builder.inttoptr(arguments[0], _POINTER), read, near_l2, data)
        return context.get_dummy_value()

    return types.void(types.int64), emit


# Kernels call intrinsics without the argument that numba passes to them.
_load_configuration: Any = _load_shapes
_prefetch: Any = _prefetch_line
# Tiles 0 to 3 hold the sums: upper left, upper right, lower left, lower right. 4 and 5 are the upper and lower rows
# of the left operand, 6 and 7 the left and right columns of the right one.
_release = _on_tiles("llvm.x86.tilerelease")
_zero_0, _zero_1, _zero_2, _zero_3 = (_on_tiles("llvm.x86.tilezero", tile) for tile in range(4))
_load_0, _load_1, _load_2, _load_3 = (_on_memory("llvm.x86.tileloadd64", tile) for tile in range(4))
_store_0, _store_1, _store_2, _store_3 = (_on_memory("llvm.x86.tilestored64", tile) for tile in range(4))
_load_upper, _load_lower, _load_left, _load_right = (_on_memory("llvm.x86.tileloadd64", tile) for tile in range(4, 8))
_dot_0, _dot_1, _dot_2, _dot_3 = (
    _on_tiles("llvm.x86.tdpbf16ps", *tiles) for tiles in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))
)

_OUT_STRIDE = 32 * 4
_OUT_RIGHT = 16 * 4
_OUT_LOWER = 16 * _OUT_STRIDE
_PANEL_STRIDE = 64
_PANEL_RIGHT = 16 * _PANEL_STRIDE
_PANEL_STEP = 2 * _PANEL_RIGHT
_A_STEP = 32 * 2
_LINE = 64


@kernel
def begin() -> None:
    """Prepare this thread for `multiply_block`; call it once before many blocks, and `end` after them.

    Between the two, the thread's tiles are configured (8 of 16 rows by 64 bytes), which nothing else may change; they
    hold nothing from one block to the next. The kernel keeps them across context switches. A thread that a block is
    computed on needs its own pair. Pairs do not nest: the inner `end` would leave the outer thread unprepared, and a
    block without preparation ends the process (illegal instruction).
    """
    _load_configuration()


@kernel
def end() -> None:
    """Give the tiles back to their initial state, so that context switches do not save them and cores can sleep."""
    _release()


@kernel
def _start(out: int, accumulate: bool) -> None:
    if accumulate:
        _load_0(out, _OUT_STRIDE)
        _load_1(out + _OUT_RIGHT, _OUT_STRIDE)
        _load_2(out + _OUT_LOWER, _OUT_STRIDE)
        _load_3(out + _OUT_LOWER + _OUT_RIGHT, _OUT_STRIDE)
    else:
        _zero_0()
        _zero_1()
        _zero_2()
        _zero_3()


@kernel
def _step(a: int, a_lower: int, a_stride: int, b: int) -> None:
    """Add the products of 32 of k; each tile is loaded right before its first use, the next while it multiplies."""
    _load_left(b, _PANEL_STRIDE)
    _load_upper(a, a_stride)
    _dot_0()
    _load_right(b + _PANEL_RIGHT, _PANEL_STRIDE)
    _dot_1()
    _load_lower(a_lower, a_stride)
    _dot_2()
    _dot_3()


@kernel
def _store(out: int) -> None:
    _store_0(out, _OUT_STRIDE)
    _store_1(out + _OUT_RIGHT, _OUT_STRIDE)
    _store_2(out + _OUT_LOWER, _OUT_STRIDE)
    _store_3(out + _OUT_LOWER + _OUT_RIGHT, _OUT_STRIDE)


@kernel
def multiply_block(a: int, a_stride: int, b: int, num_k32: int, out: int, accumulate: bool) -> None:
    """Compute 32 rows by 32 columns of a bfloat16 product, between `begin` and `end` on the same thread.

    Per 32 of k an element gets (sum of products of even k) + (sum of products of odd k), each summed by fused
    multiply-add in ascending order; these are added in ascending order to zero, or to what the element holds. All is
    float32 rounded to nearest even; subnormal numbers count as zero, and results that are subnormal become zero.

    Parameters
    ----------
    a : int
        Address of the left operand: 32 rows of ``32 * num_k32`` bfloat16, all of them finite and readable.
    a_stride : int
        Bytes from one of its rows to the next.
    b : int
        Address of the right operand: one panel, ``[num_k32][2][16][16][2]`` (`hpcpipe.kernels.panels`).
    num_k32 : int
        Contraction in units of 32.
    out : int
        Address of 32 x 32 float32, contiguous, aligned to 64 bytes.
    accumulate : bool
        Add to what `out` holds instead of overwriting it.

    Notes
    -----
    Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.
    """
    _start(out, accumulate)
    a_lower = a + 16 * a_stride
    for step in range(num_k32):
        _step(a + step * _A_STEP, a_lower + step * _A_STEP, a_stride, b + step * _PANEL_STEP)
    _store(out)


@kernel
def multiply_block_and_prefetch(
    a: int, a_stride: int, b: int, num_k32: int, out: int, accumulate: bool, ahead: int
) -> None:
    """Do what `multiply_block` does, and bring the panel at `ahead` into L2 meanwhile.

    For the last block of rows that uses a panel where panels come from L3 or memory.

    Parameters
    ----------
    a, a_stride, b, num_k32, out, accumulate
        As for `multiply_block`.
    ahead : int
        Address of the next panel, of `num_k32` steps.
    """
    _start(out, accumulate)
    a_lower = a + 16 * a_stride
    for step in range(num_k32):
        for line in range(step * _PANEL_STEP, (step + 1) * _PANEL_STEP, _LINE):
            _prefetch(ahead + line)
        _step(a + step * _A_STEP, a_lower + step * _A_STEP, a_stride, b + step * _PANEL_STEP)
    _store(out)
