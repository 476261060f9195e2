"""The writer process of a rank, and the memory in which it finds what to write."""

import numpy as np

from hpcpipe.checkpoint.process import WriterProcess
from hpcpipe.memory.shared import SharedBlock
from hpcpipe.train.save import SNAPSHOT


class WriterMemory:
    """A writer process and the memory that it shares with its rank; made before MPI starts.

    Parameters
    ----------
    starts_now : bool
        Whether the process starts at once, or when there is something to write.

    Attributes
    ----------
    process : WriterProcess
        The process.
    is_busy : bool
        Whether it is writing a checkpoint that ranks wait for.
    """

    def __init__(self, *, starts_now: bool = True) -> None:
        self._start(starts_now=starts_now)

    def _start(self, *, starts_now: bool = True) -> None:
        self._block = SharedBlock(SNAPSHOT)
        self._memory: np.ndarray | None = None
        self.process = WriterProcess(self._block.handle, starts_now=starts_now)
        self.is_busy = False

    @property
    def handle(self) -> int:
        """Open file descriptor of the memory."""
        return self._block.handle

    def claim(self, num_bytes: int) -> np.ndarray:
        """Return the shared memory, for the first user or the next; what the last one has left undone is given up.

        Raises
        ------
        UsageError
            The machine does not have so much memory.
        """
        if self.is_busy:
            self.process.kill()
            self.is_busy = False
        if self._memory is not None and self._memory.nbytes != num_bytes:
            self.close()
            self._start()
        self.process.forget()
        if self._memory is None:
            self._memory = self._block.allocate(num_bytes)
        return self._memory

    def close(self) -> None:
        """End the process."""
        self.process.close()
        self._block.close()
