"""Checkpoints of a run while it trains: a copy is taken between two steps, and written while the next ones run.

All ranks go through the same phases at the same steps, because each moves on by what the row that every step shares
says of all of them. So nothing is sent or waited for on the way, and one checkpoint is under way at a time.
"""

import json
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe.checkpoint.layout import epoch_text, partial_name, step_name
from hpcpipe.checkpoint.snapshot import Snapshot, snapshot_bytes
from hpcpipe.errors import BY_CODE, DiskError, ExitCode
from hpcpipe.faults import hooks
from hpcpipe.mpi.collectives import gather_bytes, gather_bytes_at, gather_rows
from hpcpipe.train.cadence import Cadence, Costs
from hpcpipe.train.save import header_of, piece_arrays, piece_specs
from hpcpipe.train.session import Session
from hpcpipe.train.state import State
from hpcpipe.train.writer_memory import WriterMemory

_LONGEST_WRITE_S = 3600.0
# A rank whose own writer does not answer gives up before the others do, and says why.
_LONGEST_WAIT_S = _LONGEST_WRITE_S + 60.0
_ATTEMPTS_AT_END = 2


class Phase(IntEnum):
    """How far the checkpoint under way is; its name is the order that writers carry out meanwhile."""

    IDLE = 0
    WRITE = 1
    COMMIT = 2
    VERIFY = 3


class Answer(IntEnum):
    """What a rank's writer says of the order of the phase."""

    NONE = 0
    DONE = 1
    FAILED = 2


class Checkpoints:
    """Takes checkpoints of a state, and sees that they are written.

    Parameters
    ----------
    session : Session
        The run; every rank makes its `Checkpoints` together with the others.
    state : State
        Only read.
    writer : WriterMemory
        This rank's; closed by its owner.
    data : dict
        Identifies the token file and its tokenizer in the header.
    lock : dict or None
        ``path`` and ``fence`` of the run's lock, which whoever commits must still hold; None where there is none.
    cadence : Cadence
        Says when one is due; rank 0's counts.
    token : str
        Hexadecimal digits that name this launch, the same on all ranks: part of the names of unfinished checkpoints.
    epoch : int
        Which of the launch's `Checkpoints` this is.

    Attributes
    ----------
    step : int
        Step of the newest checkpoint that this run has committed, and not withdrawn, or gone on from.
    commit_s : float
        Seconds from the last step of the newest checkpoint of this run until it was valid; 0 before the first.
    blocked_s : float
        Seconds that training has waited for checkpoints so far, on this rank.
    """

    def __init__(
        self,
        session: Session,
        state: State,
        writer: WriterMemory,
        data: dict[str, str],
        lock: dict[str, str] | None,
        cadence: Cadence,
        token: str,
        epoch: int = 0,
    ) -> None:
        self.step = state.step
        self.commit_s = 0.0
        self.blocked_s = 0.0
        self._session, self._state, self._data, self._lock, self._cadence = session, state, data, lock, cadence
        self._comm, self._waiter = session.grid.comm, session.waiter
        specs = piece_specs(state)
        sizes = [spec.num_bytes for spec in specs]
        memory = writer.claim(snapshot_bytes(sizes))
        self._writer, self._process = writer, writer.process
        self._snapshot = Snapshot(memory, sizes)
        self._has_pieces = bool(specs)
        order = {"do": "prepare", "rank": self._comm.rank, "bytes": memory.nbytes}
        self._process.prepare({**order, "pieces": [spec.to_json() for spec in specs]})
        self._token = f"{token}{epoch_text(epoch)}"
        if session.is_root:
            root = str(session.directory.checkpoints)
            self._process.send({"do": "clean", "root": root, "token": token, "epoch": epoch})
        self._phase, self._answer = Phase.IDLE, Answer.NONE
        self._reply: dict[str, Any] = {}
        self._num_failures, self._num_taken = 0, 0
        self._step_before = state.step
        self._is_retaining = False
        self._began_s, self._blocked_by_this_s = 0.0, 0.0
        self._writing_step = 0
        self._header: dict[str, Any] = {}
        self._costs = Costs()

    @property
    def answer(self) -> Answer:
        """What this rank's writer has said of the order of the phase, for the row that the ranks share."""
        self._hear_all(self._process.poll())
        return self._answer

    @property
    def is_due_by_time(self) -> bool:
        """Whether rank 0 says that the next one is due."""
        return self._session.is_root and self._phase is Phase.IDLE and self._cadence.is_due_by_time(time.monotonic())

    def is_due(self, step: int, by_time: bool) -> bool:
        """Return whether one is due after a step, on every rank alike."""
        return by_time or self._cadence.is_due_by_step(step)

    def after_step(self, step_s: float, answers: tuple[int, ...]) -> None:
        """Move on by what the ranks have told each other in a step; every rank calls it after every step.

        Parameters
        ----------
        step_s : float
            Seconds that the step took.
        answers : tuple of int
            `answer` of each rank.

        Raises
        ------
        NumericsError
            On every rank, if a weight or moment is not a finite number; nothing is committed.
        DiskError
            On every rank, if ``checkpoint.max_failures`` checkpoints in a row have failed.
        """
        self._costs.add(step_s, self._phase is not Phase.IDLE)
        with _Timed(self._add_blocked):
            self._advance(answers)

    def take(self, facts: dict[str, Any]) -> None:
        """Take a checkpoint of the last finished step; where one is under way, skip it and say so, or wait.

        Parameters
        ----------
        facts : dict
            What the header says beside the usual, such as ``val_loss``.
        """
        session, step = self._session, self._state.step
        if session.config.checkpoint.when_busy == "wait":
            with _Timed(self._add_blocked):
                self._drain(True)
        if self._phase is not Phase.IDLE:
            under_way_s = time.monotonic() - self._began_s
            session.events.add("checkpoint skipped", step=step, writing=self._writing_step, seconds=under_way_s)
            session.console.say(
                f"checkpoint of step {step} skipped: that of step {self._writing_step} is still being written,"
                f" {under_way_s:.1f} s so far"
            )
            return
        self._began_s, self._blocked_by_this_s, self._writing_step = time.monotonic(), 0.0, step
        hooks.point("checkpoint")
        # What is left of an attempt that failed may be removed only later.
        self._num_taken += 1
        with _Timed(self._add_blocked):
            self._snapshot.take(piece_arrays(self._state))
            if session.is_root:
                fence = {"fence": self._lock["fence"]} if self._lock else {}
                self._header = header_of(self._state, session.grid, self._data, {**facts, **fence})
            self._enter(Phase.WRITE, Answer.NONE if self._has_pieces else Answer.DONE)
            if self._has_pieces:
                self._process.send({"do": "write", "step": step, "partial": str(self._partial)})
        self._cadence.took(time.monotonic())

    def finish(self, facts: dict[str, Any], *, save: bool, read_back: bool) -> None:
        """Wait for the checkpoint under way, and take and write one of the last finished step.

        Parameters
        ----------
        facts : dict
            As for `take`.
        save : bool
            Whether there is to be one of the last finished step.
        read_back : bool
            Whether to wait until the newest one was read back from the disk, and old ones were removed; a run that has
            little time left does not.

        Raises
        ------
        NumericsError, DiskError
            As `after_step`; DiskError also if the last checkpoint could not be written, or, on one rank, if its writer
            has not answered for an hour.
        """
        self._drain(read_back)
        problem = ""
        for _ in range(_ATTEMPTS_AT_END):
            if not save or self.step == self._state.step:
                break
            self._drain(True)
            self.take(facts)
            problem = self._drain(read_back) or problem
        if save and self.step != self._state.step:
            text = f"the last checkpoint, of step {self._state.step}, could not be written: {problem}"
            raise DiskError(text).on_all()
        if read_back:
            self._process.wait(self._has_retained, _LONGEST_WRITE_S)

    def _drain(self, read_back: bool) -> str:
        """Wait until no checkpoint is under way; return why it failed, if it did."""
        problem = ""
        # One rank's disk may be much slower than another's.
        timeout_s, self._waiter.timeout_s = self._waiter.timeout_s, _LONGEST_WAIT_S
        while self._phase not in (Phase.IDLE, *(() if read_back else (Phase.VERIFY,))):
            if self._phase is not Phase.COMMIT or self._session.is_root:
                self._process.wait(self._is_answered, _LONGEST_WRITE_S)
            row = np.array([self._answer], np.int64)
            answers = gather_rows(self._comm, self._waiter, row)[:, 0].tolist()
            problem = self._advance(tuple(answers)) or problem
        self._waiter.timeout_s = timeout_s
        return problem

    def _is_answered(self, replies: list[dict[str, Any]]) -> bool:
        self._hear_all(replies)
        return self._answer is not Answer.NONE

    def _has_retained(self, replies: list[dict[str, Any]]) -> bool:
        self._hear_all(replies)
        return not self._is_retaining

    def _hear_all(self, replies: list[dict[str, Any]]) -> None:
        for reply in replies:
            self._hear(reply)

    def _hear(self, reply: dict[str, Any]) -> None:
        """Take note of what the writer says."""
        self._is_retaining &= "died" not in reply and reply["do"] != "retain"
        is_lost = "died" in reply and self._phase is not Phase.IDLE and self._answer is Answer.NONE
        if is_lost or reply.get("do") == self._phase.name.lower():
            self._reply = {**reply, "failed": ExitCode.DISK, "problem": reply["died"]} if is_lost else reply
            self._answer = Answer.FAILED if "failed" in self._reply else Answer.DONE
        elif "died" in reply:
            self._session.events.add("checkpoint writer died", problem=reply["died"])
            self._session.console.say(f"warning: {reply['died']}; the next checkpoint starts another")
        elif "failed" in reply and reply["do"] != "prepare":
            self._session.events.add("checkpoint clean-up failed", problem=reply["problem"])
            self._session.console.say(f"warning: {reply['problem']}")

    def _advance(self, answers: tuple[int, ...]) -> str:
        """Enter the next phase if all writers have answered; return why the checkpoint failed, if it did."""
        asked = answers[:1] if self._phase is Phase.COMMIT else answers
        if self._phase is Phase.IDLE or Answer.NONE in asked:
            return ""
        if Answer.FAILED in asked:
            return self._fail()
        if self._phase is Phase.WRITE:
            self._commit()
        elif self._phase is Phase.COMMIT:
            self._committed()
        else:
            self._verified()
        return ""

    def _enter(self, phase: Phase, answer: Answer = Answer.NONE) -> None:
        self._phase, self._answer, self._reply = phase, answer, {}
        self._writer.is_busy = phase is not Phase.IDLE

    def _commit(self) -> None:
        """Let rank 0 commit what all ranks have written."""
        record = self._reply.get("record")
        content = json.dumps(record).encode() if record else b""
        records = gather_bytes_at(self._comm, self._waiter, content, 0)
        self._enter(Phase.COMMIT)
        if self._session.is_root:
            known = [json.loads(content) for content in records if content]
            order = {"do": "commit", "partial": str(self._partial), "header": self._header, "records": known}
            self._process.send({**order, "lock": self._lock})

    def _committed(self) -> None:
        """Say that the checkpoint is valid, and have it read back."""
        self._step_before, self.step = self.step, self._writing_step
        session, seconds = self._session, time.monotonic() - self._began_s
        self.commit_s = seconds
        session.events.add(
            "checkpoint",
            step=self.step,
            path=str(self._path),
            seconds=seconds,
            blocked_s=self._blocked_by_this_s,
            interval_s=self._cadence.seconds or None,
        )
        session.console.log(
            f"checkpoint of step {self.step} written in {seconds:.2f} s; training waited"
            f" {self._blocked_by_this_s * 1e3:.0f} ms"
        )
        session.status(self._state.step, None)
        hooks.point("committed")
        self._enter(Phase.VERIFY, Answer.NONE if self._has_pieces else Answer.DONE)
        if self._has_pieces:
            self._process.send({"do": "verify", "path": str(self._path)})

    def _verified(self) -> None:
        """Remove what is not to be kept: the new checkpoint has been read back."""
        self._enter(Phase.IDLE)
        self._num_failures = 0
        self._cadence.learn(self._blocked_by_this_s + self._costs.take_slowdown_s())
        if self._session.is_root:
            keep = self._session.config.checkpoint
            rules = {"keep": keep.keep, "keep_every": keep.keep_every, "keep_best": keep.keep_best}
            root = str(self._session.directory.checkpoints)
            self._process.send({"do": "retain", "root": root, "newest": str(self._path), **rules})
            self._is_retaining = True

    def _fail(self) -> str:
        """Give the checkpoint up; every rank learns why."""
        session, step = self._session, self._writing_step
        failed = self._answer is Answer.FAILED
        own = json.dumps([int(self._reply["failed"]), self._reply["problem"]]).encode() if failed else b""
        code, problem = next(json.loads(text) for text in gather_bytes(self._comm, self._waiter, own) if text)
        was_committed = self._phase is Phase.VERIFY
        self._enter(Phase.IDLE)
        self._num_failures += 1
        if was_committed:
            self.step = self._step_before
        if session.is_root:
            order = {"do": "withdraw", "path": str(self._path)} if was_committed else None
            self._process.send(order or {"do": "abandon", "partial": str(self._partial)})
        session.events.add("checkpoint failed", step=step, problem=problem, in_a_row=self._num_failures)
        error = BY_CODE.get(code, DiskError)(problem)
        if not isinstance(error, DiskError) and code != ExitCode.DAMAGED:
            raise error.on_all()
        session.console.say(f"checkpoint of step {step} failed ({self._num_failures} in a row): {problem}")
        if self._num_failures >= session.config.checkpoint.max_failures:
            raise DiskError(
                f"{self._num_failures} checkpoints in a row failed (checkpoint.max_failures), the last with: {problem}"
            ).on_all()
        return str(problem)

    @property
    def _path(self) -> Path:
        return self._session.directory.checkpoints / step_name(self._writing_step)

    @property
    def _partial(self) -> Path:
        return self._session.directory.checkpoints / partial_name(
            self._writing_step, f"{self._token}{self._num_taken:x}"
        )

    def _add_blocked(self, seconds: float) -> None:
        self.blocked_s += seconds
        self._blocked_by_this_s += seconds


class _Timed:
    """Adds the seconds that a block took."""

    def __init__(self, add: Callable[[float], None]) -> None:
        self._add = add

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._add(time.perf_counter() - self._start)
