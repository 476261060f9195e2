"""Looks at what single actions compute: twice, to see whether it is the same, or for numbers that are not finite."""

import math
import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpcpipe.kernels.digest import digest
from hpcpipe.model.layer import Arrays, Layer
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.pipeline.executor import Computed, Work
from hpcpipe.schedule.action import Kind, Schedule

_FORWARD, _BACKWARD, _WEIGHTS, _SUM = range(4)
_PARTS = ("forward", "backward", "weight gradient", "sum of the gradients")
_KIND = {Kind.F: _FORWARD, Kind.B: _BACKWARD, Kind.I: _BACKWARD, Kind.W: _WEIGHTS}
_NONE = -1


@dataclass(frozen=True)
class Place:
    """Where a number that is not finite was first seen.

    Attributes
    ----------
    rank : int
        In the grid.
    part : str
        ``forward``, ``backward``, ``weight gradient`` or ``sum of the gradients`` (over microbatches and replicas).
    stage : int
        The stage.
    microbatch : int or None
        Its index in the global batch; None for a sum.
    layer : str
        The first layer of the stage whose output it was in; empty where that is not known.
    """

    rank: int
    part: str
    stage: int
    microbatch: int | None
    layer: str

    def __str__(self) -> str:
        """Say where it is."""
        of_microbatch = "" if self.microbatch is None else f", microbatch {self.microbatch}"
        of_layer = f", layer {self.layer}" if self.layer else ""
        return f"the {self.part} of stage {self.stage}{of_microbatch}{of_layer} (rank {self.rank})"


@dataclass(frozen=True)
class Difference:
    """An action that has given different results from the same input.

    Attributes
    ----------
    rank : int
        In the grid.
    stage, microbatch : int
        Of the forward; the microbatch's index in the global batch.
    is_decided : bool
        Whether two of three results were the same, so that these are used.
    """

    rank: int
    stage: int
    microbatch: int
    is_decided: bool


def is_finite(array: np.ndarray) -> bool:
    """Return whether all elements are finite, without making an array."""
    # Both are NaN if an element is.
    return not array.size or (math.isfinite(array.min()) and math.isfinite(array.max()))


class ActionGuard:
    """What is looked at while a rank walks its schedule.

    Parameters
    ----------
    work : Work
        Of the rank's executor; its ``check`` is set here.
    schedule : Schedule
        What is walked.
    model : sequence of Layer
        All layers, to name them.
    stages : mapping of int to sequence of Layer
        The layers of the rank's stages.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    seed : int
        Of the choice of actions that are computed twice.
    every : int
        Steps between two of these; 0: never.

    Attributes
    ----------
    differed : int
        In the current step: 0, or a number that says which action gave different results; see `difference`.
    """

    def __init__(
        self,
        work: Work,
        schedule: Schedule,
        model: Sequence[Layer],
        stages: Mapping[int, Sequence[Layer]],
        grid: Grid,
        waiter: Waiter,
        seed: int,
        every: int,
    ) -> None:
        self._work = work
        self._num_stages, self._num_microbatches = schedule.num_stages, schedule.num_microbatches
        self._model, self._stages = model, stages
        self._grid, self._waiter = grid, waiter
        self._seed, self._every = seed, every
        self._chosen = (_NONE, _NONE)
        self.differed = 0
        self._first: tuple[int, ...] | None = None
        self._inspects = False

    def begin(self, step: int, inspect: bool) -> None:
        """Choose what is looked at in a walk of the schedule.

        Parameters
        ----------
        step : int
            The step.
        inspect : bool
            Look at all actions for numbers that are not finite.
        """
        self.differed, self._first, self._inspects = 0, None, inspect
        self._work.check = None
        if inspect:
            self._work.check = self._inspect
        elif self._every and step % self._every == 0:
            replica, self._chosen = self._choose(step)
            if replica == self._grid.replica and self._chosen[0] in self._stages:
                self._work.check = self._compare

    def check_sum(self, stage: int, total: np.ndarray) -> None:
        """Look at the sum of a stage's gradients over the microbatches of this replica, or over all."""
        if self._inspects and not is_finite(total):
            self._note(_SUM, _NONE, stage, _NONE)

    def difference(self, rank: int, differed: int) -> Difference:
        """Say what another rank's `differed` means."""
        place, is_undecided = divmod(differed - 1, 2)
        stage, microbatch = divmod(place, self._num_microbatches)
        return Difference(rank, stage, self._global(rank, microbatch), not is_undecided)

    def find_first(self) -> Place | None:
        """Return where the first number that was not finite came from, None if nobody saw any; all ranks call it."""
        own = (_NONE,) * 4 if self._first is None else self._first
        rows = gather_rows(self._grid.comm, self._waiter, np.array(own, np.int64)).tolist()
        found = [(_order(*row), rank, row) for rank, row in enumerate(rows) if row[0] != _NONE]
        if not found:
            return None
        _, rank, (kind, microbatch, stage, layer) = min(found)
        return Place(
            rank,
            _PARTS[kind],
            stage,
            None if microbatch == _NONE else self._global(rank, microbatch),
            "" if layer == _NONE else self._model[layer].prefix.rstrip("/"),
        )

    def _choose(self, step: int) -> tuple[int, tuple[int, int]]:
        """Return the replica, and the stage and microbatch: the same on every rank."""
        numbers = random.Random(f"{self._seed} {step}")
        stage, microbatch = numbers.randrange(self._num_stages), numbers.randrange(self._num_microbatches)
        return numbers.randrange(self._grid.data), (stage, microbatch)

    def _global(self, rank: int, microbatch: int) -> int:
        """Return the index of a rank's microbatch in the global batch."""
        return rank // self._grid.pipeline * self._num_microbatches + microbatch

    def _compare(self, done: Computed) -> None:
        """Compute the chosen forward twice, and a third time if the results differ."""
        action = done.action
        if action.kind is not Kind.F or (action.stage, action.microbatch) != self._chosen:
            return
        results = [_digest_of(done)]
        while len(results) < 2 or (results[0] != results[1] and len(results) < 3):
            done.again()
            results.append(_digest_of(done))
        if len(results) == 3:
            place = action.stage * self._num_microbatches + action.microbatch
            # What is in the buffers is the third result.
            self.differed = 1 + 2 * place + int(results[2] not in results[:2])

    def _inspect(self, done: Computed) -> None:
        """Note the result of an action that is not finite."""
        action = done.action
        if done.result is not None:
            finite = is_finite(done.result)
        else:
            finite = action.kind is not Kind.F or math.isfinite(done.microbatch.loss)
        if not finite:
            layer = self._find_layer(done) if action.kind is Kind.F else _NONE
            self._note(_KIND[action.kind], action.microbatch, action.stage, layer)
        elif action.kind in (Kind.B, Kind.W):
            gradients: list[Arrays] = self._work.gradients(action.stage, action.microbatch)
            if not all(is_finite(array) for arrays in gradients for array in arrays.values()):
                self._note(_WEIGHTS, action.microbatch, action.stage, _NONE)

    def _find_layer(self, done: Computed) -> int:
        """Return the number of the first layer whose output is not finite."""
        layers, streams = self._stages[done.action.stage], done.stash.streams
        index = next((i for i, stream in enumerate(streams) if not is_finite(stream)), len(layers) - 1)
        prefixes = [layer.prefix for layer in self._model]
        return prefixes.index(layers[index].prefix)

    def _note(self, *found: int) -> None:
        if self._first is None or _order(*found) < _order(*self._first):
            self._first = found


def _order(kind: int, microbatch: int, stage: int, layer: int) -> tuple[int, int, int]:
    """Return what is least for the cause of the others: forward first, and against the stages in the backward."""
    return kind, microbatch, -stage if kind == _BACKWARD else stage


def _digest_of(done: Computed) -> int:
    """Return the digest of a forward's output, or the bits of the loss."""
    if done.result is not None:
        return digest(done.result)
    return int.from_bytes(struct.pack("<d", done.microbatch.loss), "little")
