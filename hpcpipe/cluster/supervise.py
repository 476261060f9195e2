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
from hpcpipe.cluster.processes import kill_session
from hpcpipe.cluster.rank_processes import RankProcesses
from hpcpipe.cluster.relay import Relay, wait

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_TURN_S = 0.2
_HANG_CHECK_S = 1.0
_FINAL_GRACE_S = 15.0
_SURVIVING_GRACE_S = 3.0
_EMPTY_GRACE_S = 3.0
_INCOMPLETE_GRACE_S = 5.0


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
        Ranks that ended badly and nodes that were lost, first things first, as ``mpirun`` reported them. Where ranks
        survive each other, lost nodes only.
    losses : tuple of Failure
        Where ranks survive each other: those that were the first to end, shortly before the end.
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
    losses: tuple[Failure, ...] = field(default=(), compare=False)


def new_launch_id() -> str:
    """Make the unique name of a launch."""
    return f"{int(time.time())}-{os.getpid()}-{os.urandom(4).hex()}"


def supervise(
    command: Sequence[str],
    environ: Mapping[str, str],
    progress: Callable[[], Progress],
    *,
    survives_failures: bool = False,
    num_ranks: int | None = None,
) -> Outcome:
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
    survives_failures : bool
        Whether ranks survive each other once the run is `Progress.RUNNING`, so that the end of one is not the end.
    num_ranks : int, optional
        Ranks to expect on this node, where that is known.

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
            ranks = RankProcesses(process.pid, num_ranks)
            watch = _Watch(process, progress, signals, ranks, survives_failures)
            try:
                watch.until_end()
            finally:
                kill_session(process.pid)
                process.wait()
            watch.pass_rest()
    return Outcome(
        code=process.returncode,
        failures=watch.failures,
        was_asked_to_stop=watch.was_asked_to_stop,
        was_killed=watch.was_killed,
        was_ended=watch.was_ended,
        has_begun=watch.has_begun,
        told=watch.err.tail,
        losses=ranks.lost_last() if survives_failures else (),
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

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        progress: Callable[[], Progress],
        signals: _Signals,
        ranks: RankProcesses,
        survives_failures: bool,
    ) -> None:
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
        self._ranks = ranks
        self._survives_failures = survives_failures
        self._num_interrupts = 0
        self._final_since: float | None = None
        self._empty_since: float | None = None
        self._failed_since: float | None = None
        self._incomplete_since: float | None = None
        self._had_ranks = False
        self._has_told_loss = False
        self._next_check = 0.0

    @property
    def failures(self) -> tuple[Failure, ...]:
        """What ``mpirun`` has told of and the run cannot survive."""
        return tuple(one for one in self.banners.failures if one.rank is None or not self._survives_failures)

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
        started the others' daemons with. Where ranks survive each other it never ends one by itself, and one that is
        missing at the start leaves the others waiting in the start of MPI.
        """
        now = time.monotonic()
        if now < self._next_check:
            return False
        self._next_check = now + _HANG_CHECK_S
        is_final = self._look() is Progress.FINAL
        self._ranks.look()
        has_ranks = bool(self._ranks.num_children)
        self._had_ranks |= has_ranks
        is_empty = self._had_ranks and not has_ranks
        is_incomplete = self._survives_failures and not self.has_begun and self._ranks.num_lost > 0
        self._final_since = (self._final_since or now) if is_final else None
        self._empty_since = (self._empty_since or now) if is_empty else None
        self._failed_since = (self._failed_since or now) if self.failures else None
        self._incomplete_since = (self._incomplete_since or now) if is_incomplete else None
        final_grace_s = _SURVIVING_GRACE_S if self._survives_failures else _FINAL_GRACE_S
        graces = (
            (self._empty_since, _EMPTY_GRACE_S if is_final or self._survives_failures else _FINAL_GRACE_S),
            (self._final_since, final_grace_s),
            (self._failed_since, _FINAL_GRACE_S),
            (self._incomplete_since, _INCOMPLETE_GRACE_S),
        )
        return any(since is not None and now - since > grace_s for since, grace_s in graces)


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    """Let the wakeup pipe carry the signal."""
