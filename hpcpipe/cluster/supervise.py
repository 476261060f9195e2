"""Running ``mpirun``: signals and text passed on, nothing left behind at the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, auto
from types import FrameType

from hpcpipe.cluster.banner import BannerFilter, Failure
from hpcpipe.cluster.environment import parent_signal
from hpcpipe.cluster.processes import children, kill_session
from hpcpipe.cluster.relay import Relay, wait

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_TURN_S = 0.2
_HANG_CHECK_S = 1.0
_FINAL_GRACE_S = 15.0
_EMPTY_GRACE_S = 3.0


class Progress(IntEnum):
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
        Ranks that ended badly and nodes that were lost, first things first, as ``mpirun`` reported them.
    was_asked_to_stop, was_killed : bool
        A stop was asked for; everything was killed at once on request.
    was_ended : bool
        A stop was asked for before the run had begun, and ``mpirun`` was ended.
    has_begun : bool
        The run was seen to run.
    told : bytes
        The end of what came on standard error.
    """

    code: int
    failures: tuple[Failure, ...]
    was_asked_to_stop: bool
    was_killed: bool
    was_ended: bool = False
    has_begun: bool = field(default=False, compare=False)
    told: bytes = field(default=b"", compare=False)


def new_launch_id() -> str:
    """Make the unique name of a launch."""
    return f"{int(time.time())}-{os.getpid()}-{os.urandom(4).hex()}"


def supervise(command: Sequence[str], environ: Mapping[str, str], progress: Callable[[], Progress]) -> Outcome:
    """Run ``mpirun`` to its end.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP (where it is not ignored) ask the run to stop, and so does the end of the
    reader of standard output: while the run is `Progress.RUNNING` they reach ``mpirun`` as SIGUSR1, which it forwards
    to every rank; before that there is nothing to save and ``mpirun`` is ended. The third SIGINT, or SIGQUIT, kills
    everything at once. When this process dies, ``mpirun`` is ended by the kernel. Must be called from the main thread.

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
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=tie_to_parent,
        )
        with process:
            watch = _Watch(process, progress, signals)
            try:
                watch.until_end()
            finally:
                kill_session(process.pid)
                process.wait()
            watch.pass_rest()
    return Outcome(
        code=process.returncode,
        failures=tuple(watch.banners.failures),
        was_asked_to_stop=watch.was_asked_to_stop,
        was_killed=watch.was_killed,
        was_ended=watch.was_ended,
        has_begun=watch.has_begun,
        told=watch.err.tail,
    )


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
        assert process.stdout is not None and process.stderr is not None
        self.banners = BannerFilter()
        self.out = Relay(process.stdout.fileno(), sys.stdout)
        self.err = Relay(process.stderr.fileno(), sys.stderr, self.banners)
        self.was_asked_to_stop = False
        self.was_killed = False
        self.was_ended = False
        self._process = process
        self._progress = progress
        self._furthest = Progress.NOT_STARTED
        self._signals = signals
        self._num_interrupts = 0
        self._final_since: float | None = None
        self._empty_since: float | None = None
        self._failed_since: float | None = None
        self._had_ranks = False
        self._has_told_loss = False
        self._next_check = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether the run was seen to run."""
        return self._furthest is not Progress.NOT_STARTED

    def until_end(self) -> None:
        """Pass signals and text on until ``mpirun`` has ended, or hangs after the run has."""
        while self._process.poll() is None and not self._is_hanging():
            self._pass_on()
            for signum in self._signals.arrived():
                self._on_signal(signum)
            if self.out.error and not self._has_told_loss:
                self._on_lost_output(self.out.error)

    def pass_rest(self) -> None:
        """Show what is left after the end; a signal cuts it short."""
        self._signals.arrived()
        for relay in (self.out, self.err):
            relay.read_rest()
        while self.out.is_waiting or self.err.is_waiting:
            self._pass_on()
            if any(signum != signal.SIGCHLD for signum in self._signals.arrived()):
                return

    def _pass_on(self) -> None:
        """Wait a moment for text or signals, and pass the text on."""
        ready = wait((self.out, self.err), self._signals.reader, _TURN_S)
        for relay in (self.out, self.err):
            relay.pass_on(ready)

    def _look(self) -> Progress:
        """Return how far the run is; a status that somebody removed does not undo what was seen."""
        self._furthest = max(self._furthest, self._progress())
        return self._furthest

    def _on_signal(self, signum: int) -> None:
        """Act on a signal to this process."""
        if signum == signal.SIGCHLD:
            return
        self._num_interrupts += signum == signal.SIGINT
        if signum == signal.SIGQUIT or self._num_interrupts >= 3:
            self.was_killed = True
            kill_session(self._process.pid)
            return
        if signum == signal.SIGINT and self._num_interrupts == 1 and sys.stderr.isatty():
            # The terminal has just shown ^C behind the progress bar.
            self.err.add(b"\nhpcpipe: note: the run is asked to stop; a third Ctrl-C kills it at once\n")
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        """Let the run save and stop, or end ``mpirun`` where there is nothing to save."""
        self.was_asked_to_stop = True
        # mpirun complains of a second SIGTERM.
        if self.was_ended:
            return
        progress = self._look()
        self.was_ended = progress is Progress.NOT_STARTED
        if progress is not Progress.FINAL:
            self._process.send_signal(signal.SIGUSR1 if progress is Progress.RUNNING else signal.SIGTERM)

    def _on_lost_output(self, error: OSError) -> None:
        """Stop a run that nobody reads any more; where only the text is lost, as on a full disk, it goes on."""
        self._has_told_loss = True
        note = f"hpcpipe: note: standard output took no more text ({error.strerror}); "
        if isinstance(error, BrokenPipeError):
            self.err.add(f"{note}the run is asked to stop\n".encode())
            self._ask_to_stop()
        else:
            self.err.add(f"{note}the run goes on without\n".encode())

    def _is_hanging(self) -> bool:
        """Tell whether the run is over but ``mpirun`` is not: its shutdown can lock up after a rank died.

        What has failed by its own account it ends within a second; on several nodes its children are also what it
        started the others' daemons with.
        """
        now = time.monotonic()
        if now < self._next_check:
            return False
        self._next_check = now + _HANG_CHECK_S
        is_final = self._look() is Progress.FINAL
        has_ranks = bool(children(self._process.pid))
        self._had_ranks |= has_ranks
        is_empty = self._had_ranks and not has_ranks
        self._final_since = (self._final_since or now) if is_final else None
        self._empty_since = (self._empty_since or now) if is_empty else None
        self._failed_since = (self._failed_since or now) if self.banners.failures else None
        if self._empty_since and now - self._empty_since > (_EMPTY_GRACE_S if is_final else _FINAL_GRACE_S):
            return True
        since = [moment for moment in (self._final_since, self._failed_since) if moment is not None]
        return bool(since) and now - min(since) > _FINAL_GRACE_S


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    """Let the wakeup pipe carry the signal."""
