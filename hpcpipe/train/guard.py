"""What ranks do about numbers that go wrong: before each update all of them find the same, and do the same.

Nothing here changes a bit of a run in which nothing goes wrong; docs/numbers.md says what is covered.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

import numpy as np

from hpcpipe.config.schema import Config
from hpcpipe.errors import HpcpipeError, Interruption, NumericsError, RankError, Rewind
from hpcpipe.mpi.collectives import barrier, gather_rows
from hpcpipe.mpi.crew import CommunicationError
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.guard_actions import ActionGuard, Place
from hpcpipe.train.guard_messages import MessageGuard
from hpcpipe.train.guard_state import StateGuard
from hpcpipe.train.history import NO_HISTORY, REWOUND, History
from hpcpipe.train.rows import Checks, StepRows
from hpcpipe.train.spikes import ALARM, GRAVE, MANY, SpikeWatch
from hpcpipe.train.state import State

MOST_REPEATS = 3
"""Times in a row that messages may have changed before the ranks meet anew."""
REWIND_STEPS = 100
"""Steps that a run goes back for spikes."""

Tell = Callable[..., None]


class Verdict(Enum):
    """What all ranks do with a step whose gradients are complete."""

    UPDATE = "update"
    REPEAT = "repeat"
    SKIP = "skip"


@dataclass(frozen=True)
class _Figures:
    """What a step came to."""

    loss: float
    norm: float

    @property
    def are_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def __str__(self) -> str:
        return f"loss {self.loss:g}, gradient norm {self.norm:g}"


def _tell_nobody(event: str, **facts: Any) -> None:
    """Keep no record, where nothing is to be recorded."""


@dataclass(frozen=True)
class Surroundings:
    """What a trainer's guard needs beside the trainer.

    Attributes
    ----------
    history : History
        Of the steps before; the same on all ranks.
    tell : callable
        Records an event, with its facts by name; called on all ranks alike.
    recovers : bool
        Whether somebody catches an `Interruption`, and lets the run go on from an earlier state. Else the run ends
        where that would be needed.
    """

    history: History = NO_HISTORY
    tell: Tell = _tell_nobody
    recovers: bool = False


ALONE = Surroundings()
"""Nothing came before, nobody is told, and nobody catches an `Interruption`."""


class Guard:
    """Judges each step before it changes anything.

    Parameters
    ----------
    state : State
        What is trained.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    rows : StepRows
        What all ranks have found.
    actions : ActionGuard
        Looks at actions.
    messages : MessageGuard or None
        Counts messages.
    surroundings : Surroundings
        What came before, and who is told.

    Attributes
    ----------
    actions : ActionGuard
        As above.
    """

    def __init__(
        self,
        state: State,
        grid: Grid,
        waiter: Waiter,
        rows: StepRows,
        actions: ActionGuard,
        messages: MessageGuard | None,
        surroundings: Surroundings,
    ) -> None:
        self._config: Config = state.config
        self._state, self._grid, self._waiter, self._rows = state, grid, waiter, rows
        self.actions, self._messages = actions, messages
        self._history, self._tell = surroundings.history, surroundings.tell
        self._recovers = surroundings.recovers
        self._parts = StateGuard(state, grid, waiter) if state.config.guard.state else None
        self._spikes = SpikeWatch()
        for loss, norm in surroundings.history.steps:
            self._spikes.add(loss, norm)
        self._num_skipped = surroundings.history.num_skipped
        self._step = self._num_mismatches = self._damaged = 0
        # Figures of a first try that is being checked by a second one.
        self._doubted: _Figures | None = None

    def begin(self, step: int) -> None:
        """Prepare for a step."""
        self._step, self._num_mismatches, self._doubted = step, 0, None
        if self._parts is not None:
            self._parts.begin()

    def begin_try(self) -> None:
        """Prepare for a walk of the schedule."""
        if self._messages is not None:
            self._messages.clear()
        self.actions.begin(self._step, inspect=self._doubted is not None and not self._doubted.are_finite)

    def look(self) -> None:
        """Compare the state with what the last update has left."""
        if self._parts is not None:
            self._damaged = self._parts.find_damage()
            self._state.is_torn = self._state.is_torn or self._damaged > 0

    def checks(self) -> Checks:
        """Return what this rank has found, when all messages of the step are complete."""
        balance = self._messages.balance() if self._messages is not None else 0
        weights = self._parts.weights() if self._parts is not None and self._grid.data > 1 else 0
        return Checks(self._damaged, self.actions.differed, balance, weights)

    def judge(self, loss: float, norm: float) -> Verdict:
        """Decide what becomes of a step, from what all ranks have found; the same on every rank.

        Parameters
        ----------
        loss, norm : float
            Of the global batch.

        Raises
        ------
        Interruption, RankError
            On all ranks: the state of one has changed, messages change again and again, or a rank computes something
            else each time.
        Rewind, NumericsError
            On all ranks: too many steps were skipped.
        """
        self._require_no_damage(self._rows.damaged())
        self._require_equal_replicas()
        self._note_differences()
        if not self._rows.are_messages_whole():
            self._note_changed_messages()
            return Verdict.REPEAT
        figures, doubted = _Figures(loss, norm), self._doubted
        score = self._spikes.score(loss, norm) if figures.are_finite and self._config.guard.spikes != "off" else 0.0
        is_new = doubted is None or (doubted.are_finite and not figures.are_finite)
        if is_new and (not figures.are_finite or score > ALARM):
            self._doubted = figures
            return Verdict.REPEAT
        if doubted is not None and figures.are_finite and figures != doubted:
            event = "spike once" if doubted.are_finite else "not finite once"
            self._tell(event, step=self._step, first=str(doubted), second=str(figures))
        if not figures.are_finite:
            return self._skip_not_finite(figures)
        verdict = self._judge_spike(figures, score) if score > ALARM else Verdict.UPDATE
        self._num_skipped = 0
        self._spikes.add(loss, norm)
        return verdict

    def updating(self) -> None:
        """Note that the first tensor of a step is about to be updated."""
        self._state.is_torn = True

    def updated(self) -> None:
        """Note that the state is that of the step, which is complete."""
        if self._parts is not None:
            self._parts.updated()
        self._state.is_torn = False

    def skipped(self) -> None:
        """Note that the step is complete and has left the state as it was."""
        if self._parts is not None:
            self._parts.unchanged()

    def look_again(self) -> None:
        """Compare the state once more with what the last update has left, before it is kept; all ranks call it.

        Raises
        ------
        Interruption, RankError
            On all ranks: the state of one has changed.
        """
        if self._parts is not None:
            self._parts.begin()
            own = self._parts.find_damage()
            self._state.is_torn = self._state.is_torn or own > 0
            rows = gather_rows(self._grid.comm, self._waiter, np.array([own], np.int64))
            found: list[int] = rows[:, 0].tolist()
            self._require_no_damage({rank: number for rank, number in enumerate(found) if number})

    def _require_no_damage(self, damaged: dict[int, int]) -> None:
        """Leave the step if parts of some ranks' states have changed; all ranks call it."""
        if not damaged:
            return
        found = []
        for rank, number in damaged.items():
            stage, kind = self._part_of(rank, number)
            self._tell("state changed", step=self._step, rank=rank, stage=stage, kind=kind)
            found.append(f"a {kind} of stage {stage} on rank {rank}")
        self._interrupt(f"{' and '.join(found)} had changed since the last update, seen in step {self._step}")

    def _part_of(self, rank: int, number: int) -> tuple[int, str]:
        """Return stage and kind of a part of another rank's state, whose parts are in the order of its stages."""
        grid = self._grid
        row = np.array([number, -1, -1], np.int64)
        if rank == grid.comm.rank and self._parts is not None:
            part = self._parts.parts[number - 1]
            row[:] = number, part.stage, StateGuard.kinds.index(part.kind)
        rows = gather_rows(grid.comm, self._waiter, row)
        stage, kind = rows[rank, 1:].tolist()
        return stage, StateGuard.kinds[kind]

    def _require_equal_replicas(self) -> None:
        if self._parts is None or self._grid.data == 1 or self._rows.are_replicas_equal():
            return
        odd = self._parts.find_odd_replicas()
        if self._grid.comm.rank in {rank for rank, _ in odd}:
            # What it has taken for right after the last update was not.
            self._state.is_torn = True
            self._state.digests.pop(self._state.step, None)
        for rank, stage in odd:
            self._tell("state changed", step=self._step, rank=rank, stage=stage, kind="weight")
        named = " and ".join(f"weights of stage {stage} on rank {rank}" for rank, stage in odd)
        self._interrupt(f"{named} were not those of the other replicas, seen in step {self._step}")

    def _note_differences(self) -> None:
        for rank, differed in self._rows.differed().items():
            found = self.actions.difference(rank, differed)
            place = {"rank": rank, "stage": found.stage, "microbatch": found.microbatch}
            self._tell("computation differed", step=self._step, **place, decided=found.is_decided)
            if not found.is_decided:
                self._interrupt(
                    f"rank {rank} computed the forward of stage {found.stage}, microbatch {found.microbatch}, three"
                    f" times in step {self._step}, with three results"
                )

    def _note_changed_messages(self) -> None:
        """Find out between which ranks messages have changed; all ranks call it."""
        assert self._messages is not None
        links = self._messages.find_links()
        for sender, receiver in links:
            self._tell("message changed", step=self._step, sender=sender, receiver=receiver)
        self._num_mismatches += 1
        if self._num_mismatches == MOST_REPEATS:
            named = " and ".join(f"from rank {sender} to rank {receiver}" for sender, receiver in links)
            self._interrupt(f"messages {named} changed on their way {MOST_REPEATS} times in step {self._step}")

    def _skip_not_finite(self, figures: _Figures) -> Verdict:
        """Skip a step that is not finite twice, or go back if there were too many; all ranks call it."""
        place = self.actions.find_first()
        facts = {"step": self._step, "reason": f"not finite: {figures}", **self._facts_of(place)}
        named = f"first in {place}" if place is not None else "in the sum over replicas"
        if self._num_skipped < self._config.guard.max_skipped:
            self._num_skipped += 1
            self._tell("step skipped", **facts)
            return Verdict.SKIP
        first = self._step - self._num_skipped
        again = self._step in self._history.rewound
        if self._recovers and not again:
            cause = f"{figures} in step {self._step}, {named}, and {self._num_skipped} steps before it were skipped"
            self._rewind(cause, first - 1)
        train = self._config.train
        since = f", nor since step {first}" if first < self._step else ""
        repeated = ", again after going back" if again else ""
        error = NumericsError(
            f"step {self._step}: not finite{since}{repeated}: {figures}, {named}; nothing was updated; lower"
            f" train.learning_rate ({train.learning_rate:g}) or train.clip ({train.clip:g}) and go on from the last"
            " checkpoint"
        )
        raise error.on_all()

    def _facts_of(self, place: Place | None) -> dict[str, Any]:
        if place is None:
            return {}
        facts: dict[str, Any] = {"rank": place.rank, "part": place.part, "stage": place.stage}
        if place.layer:
            facts["layer"] = place.layer
        if place.microbatch is not None:
            parallel = self._config.parallel
            first = ((self._step - 1) * parallel.microbatches + place.microbatch) * parallel.microbatch_size
            samples = list(range(first, first + parallel.microbatch_size))
            facts |= {"microbatch": place.microbatch, "samples": samples}
        return facts

    def _judge_spike(self, figures: _Figures, score: float) -> Verdict:
        """Do what is asked for about a step that stands out, in both of its tries."""
        action, num_spikes = self._config.guard.spikes, self._spikes.num_spikes + 1
        facts = {"step": self._step, "score": round(score, 1), "loss": figures.loss, "grad_norm": figures.norm}
        self._tell("spike", **facts, action=action)
        if action == "warn":
            return Verdict.UPDATE
        is_grave = score > GRAVE or num_spikes >= MANY
        if action == "rewind" and is_grave and self._recovers and self._step not in self._history.rewound:
            self._rewind(f"{figures} in step {self._step}, a spike of score {score:.1f}", self._step - REWIND_STEPS)
        self._tell("step skipped", step=self._step, reason=f"spike of score {score:.1f}")
        return Verdict.SKIP

    def _rewind(self, cause: str, to_step: int) -> NoReturn:
        to_step = max(0, to_step)
        self._tell(REWOUND, step=self._step, to_step=to_step, cause=cause)
        self._meet()
        raise Rewind(cause, to_step)

    def _interrupt(self, cause: str) -> NoReturn:
        """Leave the step on all ranks, to go on from an earlier state or, where nobody can, to end the run."""
        if self._recovers:
            self._meet()
            raise Interruption(cause)
        error: HpcpipeError = RankError(
            f"{cause}: nothing was updated, and this run cannot restore its state while it runs; run the same command"
            " again to go on from the last checkpoint"
        )
        raise error.on_all()

    def _meet(self) -> None:
        """Wait until all ranks know what this one knows: the first that leaves breaks off what the others wait for."""
        with suppress(CommunicationError):
            barrier(self._grid.comm, self._waiter)
