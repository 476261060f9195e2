"""Compile every kernel before the first step, so that no step waits for the compiler."""

import importlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcpipe.errors import DiskError, UsageError
from hpcpipe.kernels import features, gemm, jit
from hpcpipe.kernels.cases import cases

_UNITS = {
    "amx": "matrix products by AMX tiles",
    "avx512_bf16": "matrix products by AVX-512 dot products of bfloat16 pairs",
    "vector": "matrix products by float32 vectors",
}


def compile_all(report: Callable[[str, int, int], None] | None = None, precision: str = "f32") -> None:
    """Load every kernel from disk, or compile it and keep it there; damaged files are replaced.

    Parameters
    ----------
    report : callable, optional
        Called before each kernel with its name, its number from 1, and how many there are.
    precision : str
        ``f32`` or ``bf16``.

    Raises
    ------
    UsageError
        If numba is told not to compile, and the precision is bf16.
    DiskError
        If compiled code cannot be read from or written to its directory, or stays damaged.
    """
    if precision == "bf16" and _marker("f32") is None:
        raise UsageError(
            'NUMBA_DISABLE_JIT is set, and bfloat16 kernels only run compiled: unset it, or set train.precision = "f32"'
        )
    todo = cases(precision)
    with _disk_errors():
        _remove_damaged(precision)
    for index, (function, arguments) in enumerate(todo, start=1):
        if report is not None:
            report(function.__name__, index, len(todo))
        with _disk_errors():
            _load(function, arguments)
    with _disk_errors():
        if not is_compiled(precision):
            _write_marker(precision)


def _load(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Call a kernel; if that fails, remove what the disk has of it and call it again."""
    try:
        function(*arguments)
    # Reading a damaged pickle raises whatever its bytes happen to say.
    except Exception as error:
        if isinstance(error, OSError) or not _remove_compiled(function):
            raise
        try:
            function(*arguments)
        except OSError:
            raise
        except Exception as again:
            raise DiskError(
                f"{jit.CACHE_DIRECTORY}: compiled kernels are damaged ({function.__name__}: {type(again).__name__}:"
                f" {again}): remove this directory"
            ) from again


def _remove_compiled(function: Callable[..., Any]) -> bool:
    """Remove the files of a kernel and of all helpers that kernels call; False if there are none."""
    directory = jit.compiled_directory(function)
    if directory is None:
        return False
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    files = [path for stem in (f"{name}-", "*._*-") for path in directory.glob(f"{stem}*.nb[ic]")]
    for path in files:
        path.unlink(missing_ok=True)
    return bool(files)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Say in which directory reading or writing compiled code failed, and what helps."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{jit.CACHE_DIRECTORY}: compiled kernels cannot be kept here ({error.strerror or error}): "
            "free some space, or set HPCPIPE_CACHE_DIR to a directory that can be written"
        ) from error


def is_compiled(precision: str = "f32") -> bool:
    """Tell whether the directory of compiled code holds every kernel, undamaged, for this processor and this compiler.

    Parameters
    ----------
    precision : str
        ``f32`` or ``bf16``.

    Returns
    -------
    bool
        True if ``compile_all`` has nothing to compile.
    """
    marker = _marker(precision)
    if marker is None:
        return True
    checksums = _read_marker(marker)
    try:
        return bool(checksums) and all(_checksum(marker.parent / name) == crc for name, crc in checksums.items())
    except OSError:
        return False


def describe(precision: str = "f32") -> str:
    """Say in one line what the kernels were compiled for, and what multiplies matrices.

    Parameters
    ----------
    precision : str
        ``f32`` or ``bf16``.
    """
    if precision == "bf16":
        return f"bfloat16 kernels for {jit.cpu_name()}, {_UNITS[features.family()]}, numba {jit.compiler_version()}"
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "1")
    return (
        f"float32 kernels for {jit.cpu_name()}, matrix products by {_blas()} on {threads} "
        f"thread{'' if threads == '1' else 's'}, numba {jit.compiler_version()}"
    )


def _blas() -> str:
    """Name the BLAS that scipy was built with, which is the one that numba calls."""
    scipy: Any = importlib.import_module("scipy")

    try:
        blas = scipy.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    except (KeyError, TypeError):
        return "scipy's BLAS"


def _marker(precision: str) -> Path | None:
    """Name the file that says that all kernels are there; none if numba is told not to compile."""
    directory = jit.compiled_directory(gemm.matmul)
    return None if directory is None else directory / f"complete-{precision}.json"


def _write_marker(precision: str) -> None:
    """List the files of compiled code and their checksums in the marker, which appears whole or not at all."""
    marker = _marker(precision)
    if marker is None:
        return
    checksums = {path.name: _checksum(path) for path in sorted(marker.parent.glob("*.nb[ic]"))}
    partial = marker.with_name(f"{marker.name}.{uuid.uuid4().hex}")
    partial.write_text(json.dumps(checksums))
    partial.replace(marker)


def _read_marker(marker: Path) -> dict[str, int]:
    """Return the checksum of each file that the marker names; none if there is no marker or it says something else."""
    try:
        checksums = json.loads(marker.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return checksums if isinstance(checksums, dict) else {}


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file of compiled code; 0 for an index, which grows when new types are compiled."""
    content = path.read_bytes()
    return zlib.crc32(content) if path.suffix == ".nbc" else 0


def _remove_damaged(precision: str) -> None:
    """Remove compiled code that is not what the marker says: LLVM ends the process on some of it, and runs the rest."""
    marker = _marker(precision)
    if marker is None:
        return
    for name, crc in _read_marker(marker).items():
        try:
            if _checksum(marker.parent / name) != crc:
                (marker.parent / name).unlink(missing_ok=True)
        except FileNotFoundError:
            continue
