"""Counting the blocks that numpy allocates for the data of arrays, through numpy's own interface for allocators."""

import contextlib
import ctypes
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from numpy._core import _multiarray_umath

_SET_HANDLER = 304  # PyDataMem_SetHandler's place in numpy's table of C functions
_libc = ctypes.CDLL(None)
_VERSION = 1

_Malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Calloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_Realloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Handler(ctypes.Structure):
    """PyDataMem_Handler with its PyDataMemAllocator."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("ctx", ctypes.c_void_p),
        ("malloc", _Malloc),
        ("calloc", _Calloc),
        ("realloc", _Realloc),
        ("free", _Free),
    )


@dataclass(frozen=True)
class Allocation:
    """One block of array data: its bytes, and the innermost lines of Python that asked for it."""

    num_bytes: int
    where: str


_found: list[Allocation] | None = None


def _note(num_bytes: int) -> None:
    if _found is not None:
        lines = [f"{frame.filename}:{frame.lineno} {frame.line}" for frame in traceback.extract_stack()[-5:-2]]
        _found.append(Allocation(num_bytes, "\n".join(lines)))


for _name, _arguments in (
    ("malloc", (ctypes.c_size_t,)),
    ("calloc", (ctypes.c_size_t, ctypes.c_size_t)),
    ("realloc", (ctypes.c_void_p, ctypes.c_size_t)),
):
    getattr(_libc, _name).restype = ctypes.c_void_p
    getattr(_libc, _name).argtypes = _arguments
_libc.free.restype, _libc.free.argtypes = None, (ctypes.c_void_p,)


@_Malloc
def _malloc(_, size):
    _note(size)
    return _libc.malloc(size)


@_Calloc
def _calloc(_, count, size):
    _note(count * size)
    return _libc.calloc(count, size)


@_Realloc
def _realloc(_, block, size):
    _note(size)
    return _libc.realloc(block, size)


@_Free
def _free(_, block, size):
    _libc.free(block)


# Arrays keep the handler that made them, so it lives as long as the process.
_handler = _Handler(b"counted", _VERSION, None, _malloc, _calloc, _realloc, _free)
_HANDLER_NAME = b"mem_handler"
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_capsule = _new_capsule(ctypes.addressof(_handler), _HANDLER_NAME, None)


def _numpy_function(place: int) -> int:
    """Return the address of a function in numpy's table."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    table = pointer(_multiarray_umath._ARRAY_API, None)
    return ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[place]


_set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(_numpy_function(_SET_HANDLER))


@contextlib.contextmanager
def counted_allocations() -> Iterator[list[Allocation]]:
    """Give a list of every block of array data that this thread's numpy allocates, short-lived ones included.

    Views, numpy's scalars, and what other libraries allocate do not appear in it.
    """
    global _found
    before = _set_handler(_capsule)
    _found = []
    try:
        yield _found
    finally:
        _found = None
        _set_handler(before)
