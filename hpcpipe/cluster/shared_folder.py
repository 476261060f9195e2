"""Where ranks of one node keep the memory through which they send messages."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

BACKING = "OMPI_MCA_btl_sm_backing_directory"
"""Variable with the folder in which each rank of Open MPI makes a file that the others map."""

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "hpcpipe-mpi-"
_ABANDONED_S = 60.0
_RANK_BYTES = 16 << 20
_ROOM_FOR_OTHERS = 32 << 20


@contextmanager
def shared_folder(environ: MutableMapping[str, str], num_ranks: int, *, is_one_node: bool) -> Iterator[None]:
    """Give the ranks of a launch a folder of their own for shared memory while the block runs.

    A rank that is killed does not remove its file, which then takes memory until the machine starts again. And where
    ``/dev/shm`` cannot hold the files no rank starts; then they lie with other temporary files, which is slower only
    if the system writes them to a disk. A launch that is killed with its ranks leaves its folder; the next one of the
    same user on this node removes it.

    Parameters
    ----------
    environ : mutable mapping
        The environment of ``mpirun``; a folder that the user has chosen stays.
    num_ranks : int
        Processes on this node.
    is_one_node : bool
        Whether no rank is on another node, where there is no such folder.
    """
    if BACKING in environ or not is_one_node:
        yield
        return
    base = _SHARED_MEMORY if _has_room(_SHARED_MEMORY, num_ranks * _RANK_BYTES + _ROOM_FOR_OTHERS) else None
    _remove_abandoned(_SHARED_MEMORY)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=base, ignore_cleanup_errors=True) as folder:
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            environ[BACKING] = folder
            yield
        finally:
            os.close(held)


def _remove_abandoned(base: Path) -> None:
    """Remove the folders that nobody holds any more: locks end with their process, in other containers too."""
    for folder in base.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            facts = folder.stat()
            # One that was made just now may not be locked yet.
            if facts.st_uid != os.geteuid() or time.time() - facts.st_mtime < _ABANDONED_S:
                continue
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _has_room(path: Path, num_bytes: int) -> bool:
    """Tell whether files of some size can be made in a folder."""
    try:
        return os.access(path, os.W_OK | os.X_OK) and shutil.disk_usage(path).free >= num_bytes
    except OSError:
        return False
