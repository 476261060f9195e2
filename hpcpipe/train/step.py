"""One step: run the schedule, sum the gradients, clip, update. The same bits on every grid."""

import math
import time
from dataclasses import dataclass

import numpy as np

from hpcpipe.errors import NumericsError
from hpcpipe.kernels.reduce import add_into, sum_of_squares
from hpcpipe.memory.arena import Arena
from hpcpipe.model.embedding import TOKEN_TABLE
from hpcpipe.model.layer import Arrays, Microbatch
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import exchange, gather_rows, sum_over_ranks
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.optim.clip import clip_factor, global_norm
from hpcpipe.optim.lanes import GradientLanes
from hpcpipe.optim.learning_rate import learning_rate
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.messages import Messages
from hpcpipe.pipeline.stage import Stage, Stash
from hpcpipe.schedule.build import build
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.state import State


@dataclass(frozen=True)
class StepResult:
    """What every rank knows after a step.

    Attributes
    ----------
    loss : float
        Mean negative log-likelihood per token of the global batch, in nats, before the update.
    grad_norm : float
        Norm of its gradient, before clipping.
    learning_rate : float
        Of this step.
    step_s : float
        Seconds on this rank.
    bubble : float
        Fraction of the schedule's time that ranks waited for messages, the mean over ranks.
    stop : bool
        Whether a rank was asked to stop.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    step_s: float
    bubble: float
    stop: bool


class Trainer:
    """Runs training steps on one rank.

    Parameters
    ----------
    state : State
        Weights and moments; updated in place.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    batches : TrainingBatches
        The samples of this replica.
    mode : MessageMode
        How messages are sent.
    """

    def __init__(self, state: State, grid: Grid, waiter: Waiter, batches: TrainingBatches, mode: MessageMode) -> None:
        config = state.config
        self._state = state
        self._grid = grid
        self._waiter = waiter
        self._batches = batches
        self._num_microbatches = config.parallel.microbatches // grid.data
        self._lanes = GradientLanes(
            state.parameters.new_gradients, config.parallel.lanes // grid.data, self._num_microbatches
        )
        self._layer_gradients: dict[int, list[Arrays]] = {}
        schedule = build(config.parallel.schedule, grid.pipeline, self._num_microbatches)
        stage = Stage(
            state.layers,
            state.parameters,
            config.parallel.microbatch_size,
            config.model.context,
            config.model.width,
            recompute=config.train.recompute == "full",
        )
        work = Work(load=self._load, gradients=self._gradients, finished=self._finished)
        messages = Messages(Channel(grid.pipeline_comm, waiter, mode), schedule)
        self._executor = Executor(schedule, grid.stage_rank, {grid.stage_rank: stage}, messages, work)
        # Every rank sends one row per step, so its parts have the same place and length on all ranks.
        self._order = {tensor.name: i for i, tensor in enumerate(t for layer in state.model for t in layer.tensors)}
        self._tied_elsewhere = config.model.tied and grid.pipeline > 1
        self._other_use = (
            Arena({TOKEN_TABLE: (config.model.vocab, config.model.width)}).flat
            if self._tied_elsewhere and grid.stage_rank in (0, grid.pipeline - 1)
            else None
        )

    def run(self, step: int, stop: bool) -> StepResult:
        """Run one step.

        Parameters
        ----------
        step : int
            Counted from 1.
        stop : bool
            Whether this rank was asked to stop; the result tells every rank.

        Raises
        ------
        NumericsError
            On every rank, before the update, if the loss or the gradient is not finite.
        """
        start = time.perf_counter()
        state, train = self._state, self._state.config.train
        self._waiter.waited_s = 0.0
        self._batches.load(step)
        self._executor.run()
        run_s, waited_s = self._executor.run_s, self._waiter.waited_s

        gradients = self._lanes.total()
        sum_over_ranks(self._grid.data_comm, self._waiter, gradients.flat)
        self._add_tied_uses(gradients)
        rows = self._share(gradients, stop, waited_s / run_s)
        loss, norm = self._loss(rows), self._norm(rows)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            error = NumericsError(
                f"step {step}: loss {loss}, gradient norm {norm}: nothing was updated; lower train.learning_rate"
                f" ({train.learning_rate:g}) or train.clip ({train.clip:g}) and go on from the last checkpoint"
            )
            error.on_all_ranks = True
            raise error

        rate = learning_rate(train, step)
        scale = clip_factor(norm, train.clip) / state.tokens_per_step
        state.optimizer.update(state.parameters.weights.arrays, gradients.arrays, step, scale, rate)
        self._lanes.reset()
        state.step = step
        bubble = float(rows[:, 1].mean())
        return StepResult(loss, norm, rate, time.perf_counter() - start, bubble, bool(rows[:, 0].any()))

    def _load(self, index: int) -> Microbatch:
        return self._batches[index]

    def _gradients(self, stage: int, index: int) -> list[Arrays]:
        """Return each layer's gradient arrays in the lane of a microbatch, under local names."""
        lane = self._lanes.current(index)
        if id(lane) not in self._layer_gradients:
            self._layer_gradients[id(lane)] = [
                {tensor.name.removeprefix(layer.prefix): lane.arrays[tensor.name] for tensor in layer.tensors}
                for layer in self._state.layers
            ]
        return self._layer_gradients[id(lane)]

    def _finished(self, stage: int, index: int, microbatch: Microbatch, stash: Stash) -> None:
        self._lanes.finished(index)

    def _add_tied_uses(self, gradients: Arena) -> None:
        """Give both holders of a tied tensor the sum of its uses: the embedding's first, then the head's."""
        arrays = gradients.arrays
        if TOKEN_TABLE in arrays and "head/weight" in arrays and self._state.config.model.tied:
            add_into(arrays[TOKEN_TABLE].reshape(-1), arrays["head/weight"].reshape(-1))
        if self._other_use is None:
            return
        is_first = self._grid.stage_rank == 0
        own = arrays[TOKEN_TABLE if is_first else "head/weight"].reshape(-1)
        other = self._other_use[: own.size]
        peer = self._grid.pipeline - 1 if is_first else 0
        exchange(self._grid.pipeline_comm, self._waiter, peer, own, other)
        # Addition commutes to the bit, so either holder may start from its own use.
        add_into(own, other)

    def _share(self, gradients: Arena, stop: bool, bubble: float) -> np.ndarray:
        """Give every rank the stop flags, waiting fractions, losses and sums of squares of all ranks."""
        losses = np.zeros(self._num_microbatches)
        if self._grid.stage_rank == self._grid.pipeline - 1:
            losses[:] = [self._batches[index].loss for index in range(self._num_microbatches)]
        squares = np.zeros(len(self._order))
        for tensor in self._state.owned():
            squares[self._order[tensor.name]] = sum_of_squares(gradients.arrays[tensor.name].reshape(-1))
        return gather_rows(self._grid.comm, self._waiter, np.concatenate(([stop, bubble], losses, squares)))

    def _loss(self, rows: np.ndarray) -> float:
        """Add the losses of all microbatches in their global order."""
        grid, total = self._grid, 0.0
        for replica in range(grid.data):
            row = rows[grid.world_rank(replica, grid.pipeline - 1)]
            for value in row[2 : 2 + self._num_microbatches]:
                total += float(value)
        return total / self._state.tokens_per_step

    def _norm(self, rows: np.ndarray) -> float:
        """Add the squares of all tensors in layer order; every replica has the same."""
        stages = rows[[self._grid.world_rank(0, stage) for stage in range(self._grid.pipeline)]]
        # Each tensor's sum comes from one stage and is zero on the others.
        squares = stages[:, 2 + self._num_microbatches :].sum(axis=0)
        return global_norm([float(value) for value in squares], self._state.tokens_per_step)
