"""Files of a checkpoint opened so that nothing else is: no links, no devices, no pipes; and read in large blocks."""

import errno
import os
import stat
from pathlib import Path

import numpy as np

from hpcpipe.checkpoint.digests import Hash, new_hash

BLOCK_BYTES = 8 << 20
_AHEAD_BYTES = 32 << 20
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_regular(path: Path) -> int:
    """Open a file of a checkpoint for reading.

    Parameters
    ----------
    path : Path
        The file; neither it nor the checkpoint's directory may be a link. Those further up may.

    Returns
    -------
    int
        The descriptor, the caller's to close.

    Raises
    ------
    OSError
        It is missing, a link, or no regular file; `strerror` says which.
    """
    try:
        directory = os.open(path.parent, _FLAGS | os.O_DIRECTORY)
    except OSError as error:
        if path.parent.is_symlink():
            raise OSError(errno.ELOOP, "its directory is a symbolic link, which is not followed", str(path)) from error
        raise
    try:
        # A pipe would wait for somebody to write into it.
        handle = os.open(path.name, _FLAGS | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a symbolic link, which is not followed", str(path)) from error
        raise
    finally:
        os.close(directory)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return handle


def read_range(handle: int, offset: int, target: memoryview, digest: Hash | None = None) -> int:
    """Fill a buffer from an open file, and hash on the way while the bytes are in the processor's cache.

    Parameters
    ----------
    handle : int
        Descriptor of the file.
    offset : int
        Byte of the file to begin with.
    target : memoryview of uint8
        Filled; owned by the caller.
    digest : Hash, optional
        Updated with the bytes.

    Returns
    -------
    int
        Number of bytes read; fewer than the buffer holds if the file ends before.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    done = 0
    while done < target.nbytes:
        # The disk fetches what comes next while this is copied and hashed.
        os.posix_fadvise(handle, offset + done + BLOCK_BYTES, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        count = os.preadv(handle, [target[done : done + BLOCK_BYTES]], offset + done)
        if count == 0:
            break
        if digest is not None:
            digest.update(target[done : done + count])
        done += count
    return done


def hash_range(handle: int, offset: int, num_bytes: int, digest: Hash, block: memoryview) -> int:
    """Hash a range of an open file through a block of the caller's; returns and raises as `read_range`."""
    done = 0
    while done < num_bytes:
        part = block[: min(block.nbytes, num_bytes - done)]
        count = read_range(handle, offset + done, part, digest)
        done += count
        if count < part.nbytes:
            break
    return done


def digest_range(handle: int, offset: int, num_bytes: int, version: int, block: memoryview) -> str:
    """Return the digest of a range of an open file, or of as much of it as there is, in hexadecimal."""
    digest = new_hash(version)
    hash_range(handle, offset, num_bytes, digest, block)
    return digest.digest().hex()


def new_block(num_bytes: int = BLOCK_BYTES) -> memoryview:
    """Return an uninitialised block to read through, of `num_bytes` but not more than are read at once."""
    return np.empty(max(1, min(BLOCK_BYTES, num_bytes)), np.uint8).data
