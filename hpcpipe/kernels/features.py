"""Which instructions multiply bfloat16 matrices on this processor."""

import ctypes
import os
import platform
import sys
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba.core.config

from hpcpipe.errors import UsageError

FAMILIES = ("amx", "avx512_bf16", "vector")
"""From the fastest to the one that every processor has."""

VARIABLE = "HPCPIPE_KERNELS"

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
_REQUEST_TILE_DATA = (158, 0x1023, 18)

# Names on these are looked up at run time: neither library has types.
_settings: Any = numba.core.config
_llvm: Any = llvm


def compiler_features() -> frozenset[str]:
    """Return LLVM's names of the features that kernels may use, such as ``avx512f``."""
    text = _settings.CPU_FEATURES or _llvm.get_host_cpu_features().flatten()
    return frozenset(feature[1:] for feature in text.split(",") if feature.startswith("+"))


def has_vectors_of_64_bytes() -> bool:
    """Tell whether vector registers hold 16 float32, and there are 32 of them."""
    return "avx512f" in compiler_features()


@cache
def family() -> str:
    """Choose the family of kernels that multiplies bfloat16 matrices.

    The environment variable ``HPCPIPE_KERNELS`` may name one, to leave faster units of the processor unused.

    Returns
    -------
    str
        ``amx``: tile units. ``avx512_bf16``: dot products of pairs in vector units. ``vector``: bfloat16 widened to
        float32 in whatever vector units there are.

    Raises
    ------
    UsageError
        The variable names no family, or one that this processor cannot run.
    """
    possible = [name for name in FAMILIES if _is_possible(name)]
    # Only what is compiled can name instructions.
    if _settings.DISABLE_JIT:
        return "vector"
    asked = os.environ.get(VARIABLE)
    if not asked:
        return possible[0]
    if asked not in possible:
        raise UsageError(f"{VARIABLE} = {asked}: on this processor it may be {', '.join(possible)}")
    return asked


def has_bf16_unit() -> bool:
    """Tell whether the chosen family multiplies bfloat16 faster than float32."""
    return family() != "vector"


@cache
def request_tiles() -> bool:
    """Ask Linux for the right to use tile registers; without it the first tile instruction ends the process.

    The right belongs to the process: all its threads have it, whenever they were started, and so have processes that
    it forks, until they execute another program.

    Returns
    -------
    bool
        False where the processor or the kernel has no tiles, or a thread's stack for signals is too small for them.

    Notes
    -----
    Linux, Documentation/arch/x86/xstate.rst.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(*map(ctypes.c_long, _REQUEST_TILE_DATA)) == 0)


def _is_possible(name: str) -> bool:
    found = compiler_features()
    needed = {"amx": {"amx-tile", "amx-bf16", "avx512f", "avx512bf16"}, "avx512_bf16": {"avx512f", "avx512bf16"}}
    return needed.get(name, set()) <= found and (name != "amx" or request_tiles())
