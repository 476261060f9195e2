"""The processes that a supervisor looks after, which are not its children."""

import os
import select
import signal
from pathlib import Path

from hpcpipe.cluster.holder import process_start

STOPPED = "T"
TRACED = "t"
IN_KERNEL = "D"

MODE_WORDS = {STOPPED: "suspended", TRACED: "held by a debugger", IN_KERNEL: "in the kernel, which waits for a device"}
"""What states of a process mean that explain why it does nothing (proc(5))."""


class Process:
    """A process that cannot be mistaken for a later one of the same number.

    Parameters
    ----------
    pid : int
        Its number.
    started : int
        When it started, in clock ticks.

    Attributes
    ----------
    pid : int
        As above.
    handle : int
        Descriptor that becomes readable when the process ends; -1 where the kernel has none.

    Raises
    ------
    ProcessLookupError
        It has ended.
    """

    def __init__(self, pid: int, started: int) -> None:
        self.pid = pid
        self._started = started
        try:
            self.handle = os.pidfd_open(pid)
        except ProcessLookupError:
            raise
        except (OSError, AttributeError):
            self.handle = -1
        if not self._is_same():
            self.close()
            raise ProcessLookupError(f"process {pid} has ended")

    def is_alive(self) -> bool:
        """Return whether it has not ended."""
        if self.handle < 0:
            return self._is_same()
        return not select.select([self.handle], [], [], 0)[0]

    def mode(self) -> str:
        """Return its state, a letter as in proc(5); empty if it has ended."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii").split()[0]
        except OSError:
            return ""

    def send(self, signum: signal.Signals) -> None:
        """Send a signal, to this process only.

        Raises
        ------
        ProcessLookupError
            It has ended.
        """
        if self.handle >= 0:
            signal.pidfd_send_signal(self.handle, signum)
        elif self._is_same():
            os.kill(self.pid, signum)

    def close(self) -> None:
        """Close the descriptor."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _is_same(self) -> bool:
        return process_start(self.pid) == str(self._started)
