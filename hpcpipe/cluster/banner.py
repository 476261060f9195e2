"""What ``mpirun`` prints about ranks and nodes that failed, turned from its standard error into facts.

When a rank ends badly or a node is lost, ``mpirun`` prints a block between two lines of dashes. The run itself has
mostly said by then what went wrong, and the block hides it. Ranks that survive one print lines of Open MPI's libraries
that say nothing that they do not know. Everything else passes unchanged, in order.
"""

import re
from dataclasses import dataclass

_RULE = b"-" * 74 + b"\n"
_BLOCKS = (
    rb"\S+ detected that one or more processes exited with non-zero status,\n"
    rb"thus causing the job to be terminated\. The first process to do so was:\n\n"
    rb"   Process name: [^\n]*?(?P<exit_rank>\d+)\]\n   Exit code:    (?P<exit_code>\d+)\n",
    rb"\S+ noticed that process rank (?P<signal_rank>\d+) with PID \d+ on node (?P<signal_node>\S+) exited on\n"
    rb"signal (?P<signal>\d+[^\n]*?)\.\n",
    rb"MPI_ABORT was invoked on rank (?P<abort_rank>\d+) in communicator [^\n]*\n(?:  [^\n]*\n)*\n"
    rb"NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes\.\n"
    rb"You may or may not see output from other processes, depending on\n"
    rb"exactly when Open MPI kills them\.\n",
    rb"\S+ has exited due to process rank (?P<caller_rank>\d+) with PID \d+ on node (?P<caller_node>\S+) calling\n"
    rb'"abort"\. This may have caused other processes in the application to be\n'
    rb"terminated by signals sent by \S+ \(as reported here\)\.\n",
    rb"\S+ has lost communication with a remote daemon\.\n\n  HNP daemon   : [^\n]*\n"
    rb"  Remote daemon: \S+ on node (?P<lost_node>\S+)\n\n(?:[^\n]+\n){4}",
)
_NOISE = (
    # Of collectives that were under way; 75 to 77: a rank has died, or the communicator was revoked.
    rb"NBC_Progress: an error 7[567] was found during schedule \S+ at row-offset -?\d+ - aborting the schedule\n\n?",
    # Of PMIx and libevent, about one in a hundred times that a rank leaves without MPI_Finalize.
    rb"\[[^\]\s]+:\d+\] pmix_ptl_base: send_msg: write failed: Broken pipe [^\n]*\n",
    rb"\[warn\] Epoll (?:ADD|MOD|DEL)\(\d+\) on fd \d+ failed\. [^\n]*Bad file descriptor\n",
)
_NOISE_STARTS = (b"NBC_Progress: an error ", b"[")
_BANNER = re.compile(
    _RULE + b"(?:" + b"|".join(_BLOCKS) + b")" + _RULE + rb"\x00?|^(?:" + b"|".join(_NOISE) + b")", re.MULTILINE
)
_FIRST_WORDS = re.compile(
    rb"\S* (?:detected that one or more processes|noticed that process rank|has exited due to process rank"
    rb"|has lost communication)"
)
_LONGEST = 1024


@dataclass(frozen=True)
class Failure:
    """A rank that ended badly or a node that was lost, as ``mpirun`` saw it.

    Attributes
    ----------
    rank : int or None
        None for a node.
    sentence : str
        Reads on from "rank 3", or stands alone.
    """

    rank: int | None
    sentence: str

    def __str__(self) -> str:
        return self.sentence if self.rank is None else f"rank {self.rank} {self.sentence}"


class BannerFilter:
    """A stream filter that takes out ``mpirun``'s blocks about failed ranks and lost nodes, and lines of no use.

    Text that cannot belong to a block leaves at once, also unfinished lines. Text that may become one is held
    until it is complete, or until `release`.

    Attributes
    ----------
    failures : list of Failure
        What the blocks said, in order.
    """

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self._held = b""
        self._ending = b""

    @property
    def is_holding(self) -> bool:
        """Whether text is held that `release` would return."""
        return bool(self._held)

    def feed(self, chunk: bytes) -> bytes:
        """Take what was read and return what may be shown now.

        Parameters
        ----------
        chunk : bytes
            The next part of the stream, cut anywhere.

        Returns
        -------
        bytes
            Text to show, in order.
        """
        # A zero byte ends a block and an empty line one of libnbc, often in a write of its own.
        if chunk:
            chunk, self._ending = chunk.removeprefix(self._ending), b""
        text, self._held = self._held + chunk, b""
        shown = []
        while match := _BANNER.search(text):
            shown.append(text[: match.start()])
            text = text[match.end() :]
            is_block = match[0].startswith(_RULE)
            if is_block:
                self.failures.append(_failure(match))
            may_go_on = not text and (is_block or (match[0].startswith(b"N") and not match[0].endswith(b"\n\n")))
            self._ending = (b"\0" if is_block else b"\n") if may_go_on else b""
        start = _possible_start(text)
        self._held = text[start:]
        return b"".join([*shown, text[:start]])

    def release(self) -> bytes:
        """Return the held text: the stream ended, or nothing followed for a while."""
        held, self._held = self._held, b""
        return held


def _failure(match: re.Match[bytes]) -> Failure:
    """Turn a block into a fact."""
    found = {name: value.decode(errors="replace") for name, value in match.groupdict().items() if value}
    if "lost_node" in found:
        return Failure(None, f"node {found['lost_node']} was lost: its connection to mpirun broke")
    if "signal" in found:
        sentence = f"on {found['signal_node']} was ended by signal {found['signal']}"
        return Failure(int(found["signal_rank"]), sentence)
    if "exit_code" in found:
        return Failure(int(found["exit_rank"]), f"ended with exit code {found['exit_code']}")
    return Failure(int(found.get("abort_rank") or found["caller_rank"]), "called MPI_Abort")


def _possible_start(text: bytes) -> int:
    """Return where a block or a line of no use may have begun; the length of the text where none has."""
    start = text.find(_RULE, max(0, len(text) - _LONGEST))
    while start >= 0:
        if _may_be_block(text[start + len(_RULE) :]):
            return start
        start = text.find(_RULE, start + 1)
    line = text[text.rfind(b"\n") + 1 :]
    if line and any(line.startswith(start[: len(line)]) for start in _NOISE_STARTS):
        return len(text) - len(line)
    num_dashes = len(text) - len(text.rstrip(b"-"))
    return len(text) - min(num_dashes, len(_RULE) - 1)


def _may_be_block(text: bytes) -> bool:
    """Tell whether what follows a line of dashes is, so far, the first line of a block."""
    line, is_whole, _ = text.partition(b"\n")
    if line.startswith(b"MPI_ABORT was invoked on rank") or _FIRST_WORDS.match(line):
        return True
    return not is_whole and len(line) < 80
