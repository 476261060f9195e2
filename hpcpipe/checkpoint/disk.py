"""Files that are on the disk when the function returns, and errors that say what the disk refused."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from hpcpipe.checkpoint.trouble import from_environment
from hpcpipe.errors import DiskError

_trouble = from_environment()
_BLOCK_BYTES = 8 << 20
_CURE = {
    errno.ENOSPC: "free space there, lower checkpoint.keep, or set run.dir to another file system",
    errno.EDQUOT: "your quota there is used up: remove files, lower checkpoint.keep, or ask for more",
    errno.EROFS: "the file system is mounted read-only: set run.dir to another one",
    errno.EFBIG: "the file is larger than a limit allows: raise `ulimit -f`, or write from more ranks",
    errno.EACCES: "give yourself write permission there, or set run.dir to another directory",
    errno.EPERM: "give yourself write permission there, or set run.dir to another directory",
    errno.EIO: "the device or the server failed: check its log, or set run.dir to another file system",
}


@contextmanager
def disk_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn any OSError of the block into a DiskError that names the path, the bytes needed and the cure.

    Parameters
    ----------
    path : Path
        What is being written or removed.
    needed_bytes : int
        How much is to be written; 0 when it is not a matter of space.

    Raises
    ------
    DiskError
        The block raised OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        needed = f"; {needed_bytes:,} bytes needed{_free(path)}" if needed_bytes else ""
        cure = _CURE.get(error.errno or 0, "check the file system, or set run.dir to another one")
        raise DiskError(f"{path}: {reason}{needed}: {cure}; earlier checkpoints are untouched") from error


def write_new(path: Path, buffers: Sequence[memoryview], *, read_back: bool = True) -> None:
    """Write a new file, and return only when the disk has it.

    Parameters
    ----------
    path : Path
        Must not exist.
    buffers : sequence of memoryview of uint8
        What the file holds, one after the other; owned by the caller, not copied.
    read_back : bool
        Whether the disk must also give it back unchanged.

    Raises
    ------
    DiskError
        The file system refused, or what it returns differs. The file may be there, incomplete.
    """
    size = sum(buffer.nbytes for buffer in buffers)
    with disk_errors(path, size):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            _reserve(handle, size)
            written = 0
            for buffer in buffers:
                done = 0
                while done < buffer.nbytes:
                    _trouble.meet("write", min(_BLOCK_BYTES, buffer.nbytes - done))
                    count = os.write(handle, buffer[done : done + _BLOCK_BYTES])
                    if count == 0:
                        raise OSError(errno.EIO, f"the file system took {written + done:,} bytes and no more")
                    done += count
                written += done
            # After a failed fsync the kernel may have dropped the data: it must not be tried again.
            _trouble.meet("sync")
            os.fsync(handle)
            if read_back:
                _compare(handle, buffers, size)
        except BaseException:
            _close_quietly(handle)
            raise
        os.close(handle)


def rename(path: Path, new: Path) -> None:
    """Give a file or directory another name beside it.

    Raises
    ------
    DiskError
        The file system refused.
    """
    with disk_errors(new):
        _trouble.meet("rename")
        path.rename(new)


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to read a synced file from the disk the next time, and not from memory.

    Raises
    ------
    DiskError
        The file cannot be opened.
    """
    with disk_errors(path):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            _trouble.meet("read", os.fstat(handle).st_size)
        finally:
            os.close(handle)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power failure.

    Raises
    ------
    DiskError
        The file system refused.
    """
    with disk_errors(path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _trouble.meet("sync")
            os.fsync(handle)
        finally:
            os.close(handle)


def move_to_trash(path: Path) -> Path:
    """Rename a directory so that nothing takes it for a checkpoint, whatever happens while it is removed.

    Returns
    -------
    Path
        The new name, beside the old one; ``remove`` it, or let the next checkpoint's ``begin`` do so.

    Raises
    ------
    DiskError
        The file system refused.
    """
    trash = path.with_name(f"trash-{path.name}-{secrets.token_hex(4)}")
    rename(path, trash)
    return trash


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with everything in it; nothing happens when there is none.

    Raises
    ------
    DiskError
        The file system refused.
    """
    with disk_errors(path):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass


def _reserve(handle: int, num_bytes: int) -> None:
    """Ask for the space before anything is written, where the file system can promise it."""
    try:
        _trouble.meet("reserve")
        os.posix_fallocate(handle, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def _compare(handle: int, buffers: Sequence[memoryview], size: int) -> None:
    """Read a synced file back, past the page cache where possible, and compare."""
    if os.fstat(handle).st_size != size:
        raise OSError(errno.EIO, f"the file has {os.fstat(handle).st_size:,} bytes after writing {size:,}")
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    block = np.empty(min(_BLOCK_BYTES, size), np.uint8)
    done = 0
    for buffer in buffers:
        expected = np.frombuffer(buffer, np.uint8)
        first = done
        while done < first + expected.size:
            count = os.preadv(handle, [block[: first + expected.size - done].data], done)
            if count == 0 or not np.array_equal(block[:count], expected[done - first : done - first + count]):
                raise OSError(errno.EIO, f"what is read back from byte {done:,} on differs from what was written")
            done += count


def _close_quietly(handle: int) -> None:
    """Close after another error, which is the one to report."""
    with suppress(OSError):
        os.close(handle)


def _free(path: Path) -> str:
    """Say how much space is left, where that can be found out."""
    try:
        state = os.statvfs(path.parent)
    except OSError:
        return ""
    return f", {state.f_bavail * state.f_frsize:,} free"
