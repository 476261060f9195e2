"""Waiting for another thread's word in memory without sleeping, outside the interpreter's lock."""

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hpcpipe.kernels.jit import compiled_directory, kernel

_I64 = ir.IntType(64)
_IS_X86 = platform.machine() in ("x86_64", "AMD64")


@intrinsic
def _store(typing: Any, address: Any, value: Any) -> Any:
    """Write a word that other threads watch, after everything that was written before it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, value = arguments
        builder.store_atomic(value, builder.inttoptr(address, _I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def _load(typing: Any, address: Any) -> Any:
    """Let the core rest for a moment, then read a word that another thread writes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _IS_X86:
            nothing = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), nothing), [])
        return builder.load_atomic(builder.inttoptr(arguments[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), emit


# Kernels call intrinsics without the argument that numba passes to them.
store: Any = _store
load: Any = _load


@kernel
def exchange(own: int, value: int, other: int, wanted: int, turns: int) -> bool:
    """Write one word, then watch another until it has a value.

    Parameters
    ----------
    own, other : int
        Addresses of the words, 8 bytes each and aligned, in lines of the cache of their own.
    value : int
        What is written.
    wanted : int
        What is waited for.
    turns : int
        How often to look; one takes about 30 to 50 ns on x86.

    Returns
    -------
    bool
        False if the other word had another value all the time.
    """
    store(own, value)
    for _ in range(turns):  # noqa: SIM110 - this is compiled
        if load(other) == wanted:
            return True
    return False


def is_possible() -> bool:
    """Tell whether kernels are compiled, which they are not under ``NUMBA_DISABLE_JIT``."""
    return compiled_directory(exchange) is not None
