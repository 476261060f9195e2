"""How kernels are compiled, and where the compiled code is kept."""

import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

import llvmlite
import llvmlite.binding as llvm
import numba
import numba.core.config

from hpcpipe.kernels.features import family

# One thread per rank: ranks share the cores, and a product must not depend on how many there are. The BLAS reads
# this when it is loaded, which compiling the first matrix product does.
for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums may be split into vector lanes. NaN and infinity keep their meaning, and multiply and add are not fused.
_REORDER = {"reassoc", "nsz"}

# Neither library has types: names on these are looked up at run time.
_settings: Any = numba.core.config
_llvm: Any = llvm


def cpu_name() -> str:
    """Return LLVM's name of the processor that kernels are compiled for, such as ``znver3``."""
    return str(_settings.CPU_NAME or _llvm.get_host_cpu_name())


def compiler_version() -> str:
    """Return the version of numba."""
    return str(numba.__version__)


def compiled_directory(compiled: Any) -> Path | None:
    """Return the directory of a kernel's files, which numba names after the place of its source.

    Parameters
    ----------
    compiled : callable
        A function decorated with ``kernel``.

    Returns
    -------
    Path or None
        None where numba is told not to compile (``NUMBA_DISABLE_JIT``).
    """
    return None if _settings.DISABLE_JIT else Path(compiled.stats.cache_path)


def _digest() -> str:
    """Hash what compiled code depends on: sources of this room, processor, family of kernels, compiler."""
    features = _settings.CPU_FEATURES or _llvm.get_host_cpu_features().flatten()
    digest = hashlib.sha256()
    for part in (sys.version, cpu_name(), features, family(), numba.__version__, llvmlite.__version__):
        digest.update(f"{part}\n".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{source.name}\n".encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _is_writable(directory: Path) -> bool:
    """Make the directory if need be, and try to write into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return False
    return True


def _private_temporary_directory() -> Path:
    """Return a directory that no other user can write: compiled code is executed when it is loaded."""
    directory = Path(tempfile.gettempdir()) / f"hpcpipe-{os.getuid()}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="hpcpipe-"))
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
        return directory
    return Path(tempfile.mkdtemp(prefix="hpcpipe-"))


def find_cache_directory() -> Path:
    """Choose the directory for compiled kernels and make it.

    It is ``hpcpipe/kernels-<digest>`` under the first that is set of ``NUMBA_CACHE_DIR``, ``HPCPIPE_CACHE_DIR``,
    ``XDG_CACHE_HOME`` and ``~/.cache``; if that cannot be written, it is under a directory of the user's own in the
    system's place for temporary files. Numba notices changes only in the file that a function is in, so the digest
    covers all sources of this room. It covers the processor too, so that the nodes of a mixed cluster with one home
    directory do not write the same files.

    Returns
    -------
    Path
        A directory that exists and can be written.
    """
    name = f"kernels-{_digest()}"
    base = _user_cache()
    if base is not None and _is_writable(base / "hpcpipe" / name):
        return base / "hpcpipe" / name
    directory = _private_temporary_directory() / name
    directory.mkdir(exist_ok=True)
    return directory


def _user_cache() -> Path | None:
    """Return where the user keeps caches, if that is known: a container may have a user without a home."""
    for variable in ("NUMBA_CACHE_DIR", "HPCPIPE_CACHE_DIR", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).absolute()
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


CACHE_DIRECTORY = find_cache_directory()


@overload
def kernel(function: Function) -> Function: ...
@overload
def kernel(*, reorder: bool) -> Callable[[Function], Function]: ...
def kernel(function: Function | None = None, *, reorder: bool = False) -> Any:
    """Compile a function for the processor it runs on, at its first call with given argument types.

    The compiled code releases the interpreter's lock, divides as numpy does (by zero gives infinity or NaN, not an
    exception), and is kept on disk in ``CACHE_DIRECTORY``.

    Parameters
    ----------
    function : callable
        A function that numba can compile in nopython mode.
    reorder : bool
        Whether sums may be split into vector lanes. Without it every element is computed by exactly the operations
        that are written, wherever it lies in its array. With it the order of a sum depends on the number of terms
        and on the processor, and on nothing else. Not for a function that kernels call: it exists once by itself and
        once inside its caller, in other orders, and the process that compiles runs another one than those that load.

    Returns
    -------
    callable
        The compiled function, with the signature of ``function``.
    """
    if function is None:
        return lambda decorated: _compile(decorated, _REORDER if reorder else False)
    return _compile(function, False)


def _compile(function: Function, fastmath: set[str] | bool) -> Any:
    """Hand the function to numba with our cache directory, and leave numba's own setting as it was."""
    saved = _settings.CACHE_DIR
    _settings.CACHE_DIR = str(CACHE_DIRECTORY)
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=fastmath)(function)
    finally:
        _settings.CACHE_DIR = saved
