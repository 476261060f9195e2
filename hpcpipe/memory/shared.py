"""Memory that another process of this machine can map: no name in any file system, gone with its last user."""

import mmap
import os

import numpy as np

from hpcpipe.errors import UsageError
from hpcpipe.memory.block import Block, register


class SharedBlock:
    """A block that may be made before its size is known, so that a process that starts early can inherit it.

    Parameters
    ----------
    name : str
        What it is counted under in `hpcpipe.memory.block.allocated_bytes`.

    Attributes
    ----------
    handle : int
        Open file descriptor, for ``pass_fds``; the process that inherits it maps it with `map_shared`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.handle = os.memfd_create(f"hpcpipe {name}", os.MFD_CLOEXEC)

    def allocate(self, num_bytes: int) -> np.ndarray:
        """Return the block as zeroed uint8, with all of its memory taken from the machine now; once only.

        Raises
        ------
        UsageError
            The machine does not have so much memory.
        """
        if num_bytes == 0:
            return np.empty(0, np.uint8)
        try:
            # A page that the machine does not have would end the process with a bus error when it is touched.
            os.posix_fallocate(self.handle, 0, num_bytes)
            block = Block(self.handle, num_bytes, flags=mmap.MAP_SHARED)
        except OSError as error:
            raise UsageError(
                f"memory for the {self._name}: there is no block of {num_bytes / 2**20:,.0f} MiB to share"
                f" ({error.strerror}): use more nodes or more ranks, or lower model.width or model.layers"
            ) from error
        register(block, self._name, num_bytes)
        return np.frombuffer(block, np.uint8)

    def close(self) -> None:
        """Close the descriptor; arrays stay valid."""
        os.close(self.handle)


def map_shared(handle: int, num_bytes: int) -> np.ndarray:
    """Map a block of another process.

    Parameters
    ----------
    handle : int
        Inherited descriptor.
    num_bytes : int
        What the other process has allocated.

    Returns
    -------
    uint8 array, read-only
    """
    if num_bytes == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(mmap.mmap(handle, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ), np.uint8)
