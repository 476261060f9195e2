"""The row that every rank sends once per step, so that all know what the step came to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpcpipe.memory.layout import new_arrays
from hpcpipe.model.layer import Layer
from hpcpipe.model.tensors import BufferSpec, f64
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter

_STOP, _DUE, _ANSWER, _BUBBLE, _DAMAGED, _DIFFERED, _BALANCE, _WEIGHTS, _FIRST_LOSS = range(9)
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Notes:
    """What a rank tells the others beside the figures of a step.

    Attributes
    ----------
    stop : bool
        It was asked to stop.
    due : bool
        It is time for a checkpoint.
    answer : int
        What became of its part of the checkpoint under way; 0: nothing yet.
    """

    stop: bool = False
    due: bool = False
    answer: int = 0


@dataclass(frozen=True)
class Heard:
    """What every rank then knows: whether any was asked to stop or says that a checkpoint is due; all answers."""

    stop: bool
    due: bool
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Checks:
    """What a rank found when it looked at its numbers before the update; see `hpcpipe.train.guard`.

    Attributes
    ----------
    damaged : int
        1 + number of the first part of its state that has changed since the last update; 0: none has.
    differed : int
        What computing an action twice has shown, as `hpcpipe.train.guard_actions` counts; 0: nothing.
    balance : int
        Content of the messages that it sent less that of those it received, modulo 2**64.
    weights : int
        Digest of all its weights, below 2**64; only compared if there are several replicas.
    """

    damaged: int = 0
    differed: int = 0
    balance: int = 0
    weights: int = 0


NOTHING_FOUND = Checks()


def row_specs(model: Sequence[Layer], num_microbatches: int, num_ranks: int) -> dict[str, BufferSpec]:
    """Return what `StepRows` computes on: this rank's row, those of all ranks, and sums over ranks."""
    num_tensors = sum(len(layer.tensors) for layer in model)
    length = _FIRST_LOSS + num_microbatches + num_tensors
    return {"row": f64(length), "rows": f64(num_ranks, length), "squares": f64(num_tensors)}


class StepRows:
    """Notes, part of the time that was waited, losses and sums of squares of every rank.

    Every rank's row has the same parts at the same places, zero where another rank has the figure.

    Parameters
    ----------
    model : sequence of Layer
        All layers: the order of their tensors is that of the sums.
    num_microbatches : int
        Microbatches of one replica.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    """

    def __init__(self, model: Sequence[Layer], num_microbatches: int, grid: Grid, waiter: Waiter) -> None:
        self._grid = grid
        self._waiter = waiter
        self._num_microbatches = num_microbatches
        self._order = {tensor.name: i for i, tensor in enumerate(t for layer in model for t in layer.tensors)}
        arrays = new_arrays(row_specs(model, num_microbatches, grid.comm.size), "sums")
        self._row, self._rows, self._squares = arrays["row"], arrays["rows"], arrays["squares"]
        # A float64 has no place for 64 bits of a number, but its own are only moved.
        self._row_bits, self._bits = self._row.view(np.uint64), self._rows.view(np.uint64)

    def share(
        self,
        notes: Notes,
        bubble: float,
        losses: Sequence[float],
        squares: Mapping[str, float],
        checks: Checks = NOTHING_FOUND,
    ) -> None:
        """Give every rank the figures of all ranks; all call it.

        Parameters
        ----------
        notes : Notes
            Of this rank.
        bubble : float
            Part of the schedule's time that it waited.
        losses : sequence of float
            Of each microbatch, on ranks with the head; empty on the others.
        squares : mapping of str to float
            Sums of squares of the gradients of the tensors that it owns.
        checks : Checks
            What it found.

        Raises
        ------
        RankError
            If a rank does not answer in time.
        """
        row = self._row
        row[_STOP], row[_DUE], row[_ANSWER], row[_BUBBLE] = notes.stop, notes.due, notes.answer, bubble
        row[_DAMAGED], row[_DIFFERED] = checks.damaged, checks.differed
        self._row_bits[_BALANCE], self._row_bits[_WEIGHTS] = checks.balance, checks.weights
        for index, loss in enumerate(losses, _FIRST_LOSS):
            row[index] = loss
        for name, value in squares.items():
            row[_FIRST_LOSS + self._num_microbatches + self._order[name]] = value
        gather_rows(self._grid.comm, self._waiter, row, out=self._rows)

    def heard(self) -> Heard:
        """Return the notes of all ranks."""
        answers = tuple(int(answer) for answer in self._column(_ANSWER))
        return Heard(any(self._column(_STOP)), any(self._column(_DUE)), answers)

    def bubble(self) -> float:
        """Return the part of the schedule's time that ranks waited, the mean over ranks."""
        return sum(self._column(_BUBBLE)) / self._grid.comm.size

    def loss(self, stage_rank: int) -> float:
        """Return the sum of the losses of all microbatches in their global order; `stage_rank` holds the head."""
        total = 0.0
        for replica in range(self._grid.data):
            row = self._rows[self._grid.world_rank(replica, stage_rank)]
            for value in row[_FIRST_LOSS : _FIRST_LOSS + self._num_microbatches].tolist():
                total += value
        return total

    def squares(self) -> list[float]:
        """Return the sum of squares of each tensor in layer order; every replica has the same."""
        first = _FIRST_LOSS + self._num_microbatches
        self._squares.fill(0.0)
        for stage_rank in range(self._grid.pipeline):
            # Each tensor's sum comes from one rank and is zero on the others.
            self._squares += self._rows[self._grid.world_rank(0, stage_rank), first:]
        values: list[float] = self._squares.tolist()
        return values

    def damaged(self) -> dict[int, int]:
        """Return what changed, as in `Checks`, for each rank whose state did."""
        return self._nonzero(_DAMAGED)

    def differed(self) -> dict[int, int]:
        """Return what differed, as in `Checks`, for each rank that has computed something twice and seen that."""
        return self._nonzero(_DIFFERED)

    def are_messages_whole(self) -> bool:
        """Return whether all ranks together have received what they have sent."""
        balances: list[int] = self._bits[:, _BALANCE].tolist()
        return sum(balances) & _MASK == 0

    def are_replicas_equal(self) -> bool:
        """Return whether all replicas have the same weights."""
        weights: list[int] = self._bits[:, _WEIGHTS].tolist()
        return weights == weights[: self._grid.pipeline] * self._grid.data

    def _nonzero(self, index: int) -> dict[int, int]:
        return {rank: int(value) for rank, value in enumerate(self._column(index)) if value}

    def _column(self, index: int) -> list[float]:
        values: list[float] = self._rows[:, index].tolist()
        return values
