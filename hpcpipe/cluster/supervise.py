"""Running ``mpirun``: signals passed on, its standard error cleaned, nothing left behind at the end."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import FrameType

from hpcpipe.cluster.banner import BannerFilter, Failure
from hpcpipe.cluster.environment import parent_signal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_HELD_TEXT_S = 0.2
_HANG_CHECK_S = 1.0
_FINAL_GRACE_S = 15.0
_EMPTY_GRACE_S = 3.0


class Progress(Enum):
    """How far the run is, by its own account."""

    NOT_STARTED = auto()
    RUNNING = auto()
    FINAL = auto()


@dataclass(frozen=True)
class Outcome:
    """How ``mpirun`` ended.

    Attributes
    ----------
    code : int
        Its exit code; negative: the signal that ended it.
    failures : tuple of Failure
        Ranks that ended badly, first things first, as ``mpirun`` reported them.
    was_asked_to_stop, was_killed : bool
        A stop was asked for; everything was killed at once on request.
    was_ended : bool
        A stop was asked for before the run had begun, and ``mpirun`` was ended.
    """

    code: int
    failures: tuple[Failure, ...]
    was_asked_to_stop: bool
    was_killed: bool
    was_ended: bool = False


def new_launch_id() -> str:
    """Make the unique name of a launch."""
    return f"{int(time.time())}-{os.getpid()}-{os.urandom(4).hex()}"


def supervise(command: Sequence[str], environ: Mapping[str, str], progress: Callable[[], Progress]) -> Outcome:
    """Run ``mpirun`` to its end.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP (where it is not ignored) ask the run to stop: while the run is
    `Progress.RUNNING` they reach ``mpirun`` as SIGUSR1, which it forwards to every rank; before that there is nothing
    to save and ``mpirun`` is ended. The third SIGINT, or SIGQUIT, kills everything at once. When this process dies,
    ``mpirun`` is ended by the kernel. Must be called from the main thread.

    Parameters
    ----------
    command : sequence of str
        ``mpirun`` with its options and the program.
    environ : mapping
        Its environment.
    progress : callable
        Reads how far the run is; called a few times per second.

    Returns
    -------
    Outcome
        When it returns, no process of ``mpirun``'s session is left on this node.
    """
    parent = os.getpid()

    def tie_to_parent() -> None:
        parent_signal(signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    with _Signals() as signals:
        process = subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=tie_to_parent,
        )
        with process:
            watch = _Watch(process, progress, signals)
            try:
                watch.until_end()
            finally:
                _kill_session(process.pid)
                process.wait()
            watch.pass_rest()
    failures = tuple(watch.errors.failures)
    return Outcome(process.returncode, failures, watch.was_asked_to_stop, watch.was_killed, watch.was_ended)


class _Signals:
    """Signals of this process, readable as bytes of a pipe; the handlers before are put back at the end."""

    def __enter__(self) -> "_Signals":
        self.reader, self._writer = os.pipe()
        for end in (self.reader, self._writer):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        caught = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
        self._before = {
            signum: signal.signal(signum, _do_nothing) for signum in (*caught, signal.SIGQUIT, signal.SIGCHLD)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self.reader)
        os.close(self._writer)

    def arrived(self) -> bytes:
        """Return the numbers of the signals that came since the last call."""
        try:
            return os.read(self.reader, 4096)
        except BlockingIOError:
            return b""


class _Watch:
    """The loop beside a running ``mpirun``."""

    def __init__(self, process: subprocess.Popen[bytes], progress: Callable[[], Progress], signals: _Signals) -> None:
        assert process.stderr is not None
        self.errors = BannerFilter()
        self.was_asked_to_stop = False
        self.was_killed = False
        self.was_ended = False
        self._process = process
        self._progress = progress
        self._signals = signals
        self._stderr = process.stderr.fileno()
        self._num_interrupts = 0
        self._final_since: float | None = None
        self._empty_since: float | None = None
        self._had_ranks = False
        self._next_check = 0.0

    def until_end(self) -> None:
        """Pass signals and text on until ``mpirun`` has ended, or hangs after the run has."""
        os.set_blocking(self._stderr, False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._signals.reader, selectors.EVENT_READ)
            selector.register(self._stderr, selectors.EVENT_READ)
            while self._process.poll() is None and not self._is_hanging():
                ready = {key.fd for key, _ in selector.select(_HELD_TEXT_S)}
                for signum in self._signals.arrived() if self._signals.reader in ready else b"":
                    self._on_signal(signum)
                if self._stderr in ready:
                    if not self._pass_text():
                        selector.unregister(self._stderr)
                elif self.errors.is_holding:
                    _show(self.errors.release())

    def pass_rest(self) -> None:
        """Show what is left in the pipe after the end."""
        self._pass_text()
        _show(self.errors.release())

    def _pass_text(self) -> bool:
        """Show what has arrived; False at the end of the stream."""
        while True:
            try:
                chunk = os.read(self._stderr, 65536)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            _show(self.errors.feed(chunk))

    def _on_signal(self, signum: int) -> None:
        """Act on a signal to this process."""
        if signum == signal.SIGCHLD:
            return
        self._num_interrupts += signum == signal.SIGINT
        if signum == signal.SIGQUIT or self._num_interrupts >= 3:
            self.was_killed = True
            _kill_session(self._process.pid)
            return
        self.was_asked_to_stop = True
        progress = self._progress()
        self.was_ended |= progress is Progress.NOT_STARTED
        if progress is not Progress.FINAL:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGUSR1 if progress is Progress.RUNNING else signal.SIGTERM)

    def _is_hanging(self) -> bool:
        """Tell whether the run is over but ``mpirun`` is not: its shutdown can lock up after a rank died."""
        now = time.monotonic()
        if now < self._next_check:
            return False
        self._next_check = now + _HANG_CHECK_S
        is_final = self._progress() is Progress.FINAL
        has_ranks = bool(_children(self._process.pid))
        self._had_ranks |= has_ranks
        is_empty = self._had_ranks and not has_ranks
        self._final_since = (self._final_since or now) if is_final else None
        self._empty_since = (self._empty_since or now) if is_empty else None
        if self._empty_since and now - self._empty_since > (_EMPTY_GRACE_S if is_final else _FINAL_GRACE_S):
            return True
        return self._final_since is not None and now - self._final_since > _FINAL_GRACE_S


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    """Let the wakeup pipe carry the signal."""


def _show(text: bytes) -> None:
    """Write to standard error; a terminal that is gone must not end the run."""
    if text:
        with contextlib.suppress(OSError):
            sys.stderr.buffer.write(text)
            sys.stderr.buffer.flush()


def _children(pid: int) -> list[int]:
    """List the processes that ``mpirun`` has started on this node and that still run."""
    return [child for child, parent, _, state in _processes() if parent == pid and state not in "ZX"]


def _kill_session(session: int) -> None:
    """Kill every process of a session; ranks are in process groups of their own."""
    for pid, _, owner, state in _processes():
        if owner == session and state not in "ZX":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _processes() -> list[tuple[int, int, int, str]]:
    """List (process, parent, session, state) of every process, see proc(5)."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        found.append((int(folder.name), int(parent), int(session), state))
    return found
