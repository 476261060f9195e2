"""A rank's side of the memory file: it says what it does, keeps its flight recorder, and hears what it is told."""

import contextlib
import faulthandler
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hpcpipe.cluster.holder import process_start
from hpcpipe.errors import Interruption, RankError
from hpcpipe.watch.layout import (
    ALIVE_AT,
    CODES,
    COMMAND_AT,
    IDENTITY,
    IDENTITY_AT,
    NOTES_AT,
    OVER,
    PACE_AT,
    RECORD,
    RECORD_BYTES,
    RING_RECORDS,
    ROLE_AT,
    SLOT_HEADER_BYTES,
    STATE,
    STATE_AT,
    TEXT_AT,
    TEXT_BYTES,
    WAIT_TEXT_AT,
    WAIT_TEXT_BYTES,
    WAITED,
    Command,
    Phase,
    read_text,
    write_text,
)
from hpcpipe.watch.memory import MemoryFile
from hpcpipe.watch.pace import Pace

_FIRST_STEPS = 5
_SAFETY = 5
_LONG_WAIT_NS = 100_000_000
_LOOK_NS = 2_000_000_000

_PATIENCE = {Phase.TRAIN: 1.0, Phase.EVALUATE: 3.0, Phase.CHECKPOINT: 30.0, Phase.RECOVER: 6.0, Phase.SPARE: 1.0}
"""How many times `recovery.hang_s` a rank may take for something that has not been seen to take so long."""

_pack_record, _pack_state, _monotonic_ns = RECORD.pack_into, STATE.pack_into, time.monotonic_ns


class NoBeacon:
    """Shows nothing: for programs and ranks that nobody watches."""

    def configure(self, hang_s: float) -> None:
        """Take `recovery.hang_s`; 0: hangs are not looked for."""

    def expect(self, step_s: float) -> None:
        """Take how long a step was predicted to take, which gives the first ones enough time."""

    def publish(self, directory: Path, lock: Path, fence: str) -> None:
        """Let the supervisor write to the run directory as long as its lock has this fence."""

    def phase(self, phase: Phase) -> None:
        """Say what this rank is busy with from now on."""

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Say what this rank is busy with while a block runs; then it trains on."""
        self.phase(phase)
        yield
        self.phase(Phase.TRAIN)

    def step(self, step: int) -> None:
        """Say that a step begins."""

    def epoch(self, epoch: int, role: int) -> None:
        """Say how many recoveries there were, and which rank this process is now; -1: a spare."""

    def begin(self, kind: str, stage: int, microbatch: int) -> None:
        """Say that an action begins."""

    def end(self) -> None:
        """Say that it is done."""

    def posted(self, kind: str, name: object, peer: int, tag: int, num_bytes: int) -> None:
        """Say that a message is under way: see `nap` for who and what."""

    def nap(self, kind: str, name: object, peer: int, tag: int, what: Callable[[], str]) -> None:
        """Say that this rank still waits, before each nap.

        Parameters
        ----------
        kind : str
            ``SEND``, ``RECV`` or ``ALL``, for collectives.
        name : object
            The message; an action of the schedule has `kind`, `stage` and `microbatch`.
        peer, tag : int
            Process number and tag of the other end; -1: none.
        what : callable
            Gives the words for it.

        Raises
        ------
        Interruption
            If the supervisor wants all ranks to recover.
        RankError
            If it wants the run to end, on all ranks: the same deadlock came again and again.
        """

    def waited(self, kind: str, name: object, peer: int, tag: int, start_s: float) -> None:
        """Say that a wait is over that began at a time of `time.perf_counter`."""

    def close(self, *, has_failed: bool = False) -> None:
        """Say that this rank's part is over, well or with an error."""


class Beacon(NoBeacon):
    """Writes one slot of a memory file, from one thread.

    Every call costs about a microsecond. How long the rank may go without an event is part of what it shows: five times
    the longest action that was seen, `recovery.hang_s` at least. An outlier can only double that, so that a rank which
    was suspended once does not get away with it for ever after.

    Parameters
    ----------
    memory : MemoryFile
        Has room for the slot.
    slot : int
        The local rank.
    process : int
        Process number.
    revive : callable, optional
        Starts a supervisor in place of one that is gone.
    """

    def __init__(self, memory: MemoryFile, slot: int, process: int, revive: Callable[[], None] | None = None) -> None:
        self._memory, self._slot_number, self._process, self._revive = memory, slot, process, revive
        self._slot = memory.slot(slot)
        self._slot[:] = bytes(len(self._slot))
        self._alive = self._slot[ALIVE_AT : ALIVE_AT + 8].cast("q")
        self._command = self._slot[COMMAND_AT : COMMAND_AT + 8].cast("q")
        self._notes = memory.view[NOTES_AT : NOTES_AT + 8].cast("q")
        self._heard = 0
        self._events = self._records = 0
        self._phase, self._kind, self._stage, self._microbatch = Phase.SETUP, 0, -1, -1
        self._waits_for, self._is_told = 0, False
        self._wait_began = self._began = self._event = _monotonic_ns()
        self._step = self._epoch = self._num_steps = 0
        self._hang_ns = self._expected_ns = self._longest_ns = self._limit_ns = self._busy_ns = self._waited_ns = 0
        self._pace, self._busy_before = Pace(), 0
        self._next_look = self._event + _LOOK_NS
        self._num_notes = memory.num_notes
        self._stacks = _register_stacks()
        self._identify()
        self._show(self._event)

    def configure(self, hang_s: float) -> None:
        """Take `recovery.hang_s`; 0: hangs are not looked for."""
        self._hang_ns = int(hang_s * 1e9)
        self._identify()
        self._set_limit()
        self._show(_monotonic_ns())

    def expect(self, step_s: float) -> None:
        """Take how long a step was predicted to take, which gives the first ones enough time."""
        self._expected_ns = int(step_s * 1e9)
        self._set_limit()

    def publish(self, directory: Path, lock: Path, fence: str) -> None:
        """Let the supervisor write to the run directory as long as its lock has this fence."""
        self._memory.facts = json.dumps(
            {"directory": str(directory.absolute()), "lock": str(lock.absolute()), "fence": fence}
        )

    def phase(self, phase: Phase) -> None:
        """Say what this rank is busy with from now on."""
        now = _monotonic_ns()
        if phase is not self._phase:
            if self._phase in (Phase.SETUP, Phase.RECOVER, Phase.SPARE):
                self._num_steps = 0
            self._phase = phase
            self._record(CODES["PHASE"], -1, -1, -1, -1, 0, now, now)
        self._kind, self._stage, self._microbatch, self._waits_for = 0, -1, -1, 0
        self._set_limit()
        self._began = now
        self._show(now)
        self._look(now)

    def step(self, step: int) -> None:
        """Say that a step begins."""
        now = _monotonic_ns()
        self._num_steps += 1
        if self._num_steps > 1:
            pace = self._pace.add((self._busy_ns - self._busy_before) * 1e-9)
            struct.pack_into("<d", self._slot, PACE_AT, pace)
        self._busy_before = self._busy_ns
        if self._num_steps == _FIRST_STEPS + 1:
            self._set_limit()
        self._step, self._kind, self._stage, self._microbatch, self._waits_for = step, 0, -1, -1, 0
        self._record(CODES["PHASE"], -1, -1, -1, -1, 0, now, now)
        self._began = now
        self._show(now)
        if now > self._next_look:
            self._look(now)

    def epoch(self, epoch: int, role: int) -> None:
        """Say how many recoveries there were, and which rank this process is now; drop requests that are fulfilled."""
        self._epoch = epoch
        self._pace = Pace()
        struct.pack_into("<qd", self._slot, ROLE_AT, role + 1, 0.0)
        if self._command[0] & 0xFF == Command.RESET:
            self._heard = self._command[0]

    def begin(self, kind: str, stage: int, microbatch: int) -> None:
        """Say that an action begins."""
        self._kind, self._stage, self._microbatch, self._waited_ns = CODES[kind], stage, microbatch, 0
        now = self._began = _monotonic_ns()
        self._show(now)

    def end(self) -> None:
        """Say that it is done."""
        now = _monotonic_ns()
        interval = now - self._event
        self._busy_ns += now - self._began - self._waited_ns
        if interval > self._longest_ns:
            self._stretch(interval)
        self._event = now
        self._record(self._kind, self._stage, self._microbatch, -1, -1, 0, self._began, now)

    def posted(self, kind: str, name: object, peer: int, tag: int, num_bytes: int) -> None:
        """Say that a message is under way."""
        now = _monotonic_ns()
        stage, microbatch = getattr(name, "stage", -1), getattr(name, "microbatch", -1)
        self._record(CODES[getattr(name, "kind", kind)], stage, microbatch, peer, tag, num_bytes, now, now)

    def nap(self, kind: str, name: object, peer: int, tag: int, what: Callable[[], str]) -> None:
        """Say that this rank still waits, and do what it is told."""
        now = self._alive[0] = _monotonic_ns()
        if not self._waits_for:
            self._waits_for, self._wait_began, self._is_told = CODES[getattr(name, "kind", kind)], now, False
            self._show(now, getattr(name, "stage", -1), getattr(name, "microbatch", -1), peer, tag)
        elif not self._is_told and now - self._wait_began > _LONG_WAIT_NS:
            self._is_told = True
            write_text(self._slot, WAIT_TEXT_AT, WAIT_TEXT_BYTES, what())
        if self._command[0] != self._heard:
            self._obey()
        if now > self._next_look or self._notes[0] != self._num_notes:
            self._look(now)

    def waited(self, kind: str, name: object, peer: int, tag: int, start_s: float) -> None:
        """Say that a wait is over that began at a time of `time.perf_counter`."""
        now, start = _monotonic_ns(), int(start_s * 1e9)
        code, stage, microbatch = CODES[getattr(name, "kind", kind)], getattr(name, "stage", -1), -1
        if stage >= 0:
            microbatch = getattr(name, "microbatch", -1)
        self._record(code | WAITED, stage, microbatch, peer, tag, 0, start, now)
        self._waited_ns += now - start
        if self._waits_for:
            self._waits_for = 0
            self._show(now)

    def close(self, *, has_failed: bool = False) -> None:
        """Say that this rank's part is over, well or with an error."""
        self.phase(Phase.FAILED if has_failed else Phase.ENDED)
        if not self._is_supervised(_monotonic_ns()) and all(
            self._is_over(number) for number in range(self._memory.num_slots) if number != self._slot_number
        ):
            self._memory.unlink()

    def _show(self, now: int, wait_stage: int = -1, wait_microbatch: int = -1, peer: int = -1, tag: int = -1) -> None:
        """Write what this rank does."""
        self._event = now
        self._events = head = self._events + 1
        _pack_state(
            self._slot, STATE_AT, head, self._phase, self._kind, self._waits_for, self._stage, self._microbatch,
            wait_stage, wait_microbatch, peer, tag, self._step, self._epoch, now, self._began, self._limit_ns,
            self._busy_ns, head,
        )  # fmt: skip

    def _record(
        self, kind: int, stage: int, microbatch: int, peer: int, tag: int, num_bytes: int, start: int, end: int
    ) -> None:
        """Add an entry to the flight recorder."""
        position = SLOT_HEADER_BYTES + self._records % RING_RECORDS * RECORD_BYTES
        self._records = number = self._records + 1
        _pack_record(
            self._slot, position, number, kind, self._phase, stage, microbatch, peer, tag, self._step, self._epoch,
            num_bytes, start, end, number,
        )  # fmt: skip

    def _stretch(self, interval: int) -> None:
        """Learn how long actions take; an outlier only doubles that, except where nothing is known yet."""
        is_known = self._num_steps > _FIRST_STEPS
        self._longest_ns = min(interval, 2 * self._longest_ns) if is_known else interval
        self._set_limit()

    def _set_limit(self) -> None:
        patience = _PATIENCE.get(self._phase, 0.0)
        if not patience or not self._hang_ns:
            self._limit_ns = 0
            return
        least = int(patience * self._hang_ns)
        if self._phase is not Phase.SPARE:
            least = max(least, _SAFETY * self._longest_ns)
        if self._phase is Phase.TRAIN and self._num_steps <= _FIRST_STEPS:
            unknown = 0 if self._longest_ns else 3 * self._hang_ns
            least = max(least, _SAFETY * self._expected_ns if self._expected_ns else unknown)
        self._limit_ns = least

    def _identify(self) -> None:
        """Write who has the slot; the process number, which makes it count, comes last."""
        pid = os.getpid()
        moment = time.time_ns(), _monotonic_ns()
        rest = (pid, int(process_start(pid) or 0), self._stacks, *moment, self._hang_ns)
        IDENTITY.pack_into(self._slot, IDENTITY_AT, 0, *rest)
        struct.pack_into("<q", self._slot, IDENTITY_AT, self._process + 1)

    def _obey(self) -> None:
        """Raise what the supervisor wants."""
        self._heard = self._command[0]
        command, text = self._heard & 0xFF, read_text(self._slot, TEXT_AT, TEXT_BYTES)
        if command == Command.RESET:
            raise Interruption(text)
        if command == Command.GIVE_UP:
            raise RankError(text).on_all()

    def _look(self, now: int) -> None:
        """Print what the supervisor has to say, and see that there is one."""
        self._next_look = now + _LOOK_NS
        if self._memory.num_notes != self._num_notes:
            notes, self._num_notes = self._memory.notes(self._process, self._num_notes), self._memory.num_notes
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write("".join(f"hpcpipe: {note}\n" for note in notes))
                sys.stderr.flush()
        if self._revive is not None and self._phase not in OVER and not self._is_supervised(now):
            self._revive()

    def _is_supervised(self, now: int) -> bool:
        """Return whether the supervisor was seen lately; ranks get suspicious one after the other."""
        return now - self._memory.supervisor()[1] < (2 + self._slot_number) * _LOOK_NS

    def _is_over(self, number: int) -> bool:
        """Return whether a local rank has ended or was never there."""
        slot = self._memory.slot(number)
        process, pid, started = IDENTITY.unpack_from(slot, IDENTITY_AT)[:3]
        if not process or slot[STATE_AT + 8] in OVER:
            return True
        found = process_start(pid)
        return not found or int(found) != started


def _register_stacks() -> int:
    """Let SIGUSR2 write the stacks of all threads to a file without a name; return its descriptor, -1 if that fails.

    Python writes them from the signal handler itself, so that it works while a kernel computes with Python's lock held.
    """
    try:
        handle = os.memfd_create("hpcpipe stacks", os.MFD_CLOEXEC)
        faulthandler.register(signal.SIGUSR2, file=handle, all_threads=True)
    except (OSError, RuntimeError, AttributeError):
        return -1
    return handle
