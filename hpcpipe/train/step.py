"""One step: run the schedule, sum the gradients, clip, update. The same bits on every grid."""

import math
import time
from dataclasses import dataclass

import numpy as np

from hpcpipe.errors import NumericsError
from hpcpipe.kernels.reduce import sum_of_squares
from hpcpipe.memory.arena import Arena
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import gather_rows, sum_over_ranks
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.optim.clip import clip_factor, global_norm
from hpcpipe.optim.learning_rate import learning_rate
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.messages import Messages
from hpcpipe.schedule.action import Schedule
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.gradients import Gradients, TiedGradients
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
    schedule : Schedule
        Lowered and checked, with the state's placement.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    batches : TrainingBatches
        The samples of this replica.
    mode : MessageMode
        How messages are sent.
    """

    def __init__(
        self,
        state: State,
        schedule: Schedule,
        grid: Grid,
        waiter: Waiter,
        batches: TrainingBatches,
        mode: MessageMode,
    ) -> None:
        config = state.config
        self._state = state
        self._grid = grid
        self._waiter = waiter
        self._batches = batches
        self._num_microbatches = schedule.num_microbatches
        self._gradients = Gradients(state, config.parallel.lanes // grid.data, schedule.num_microbatches)
        work = Work(
            load=batches.__getitem__,
            gradients=self._gradients.of_layers,
            finished=lambda stage, index, microbatch, stash: self._gradients.finished(stage, index),
        )
        self._executor = Executor(
            schedule,
            grid.stage_rank,
            state.compute_stages(config.parallel.microbatch_size, config.train.recompute == "full"),
            Messages(Channel(grid.pipeline_comm, waiter, mode), schedule),
            work,
        )
        self._tied = TiedGradients(state, grid, waiter)
        # Every rank sends one row per step, so its parts have the same place and length on all ranks.
        self._order = {tensor.name: i for i, tensor in enumerate(t for layer in state.model for t in layer.tensors)}

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

        totals = self._gradients.totals()
        for total in totals.values():
            sum_over_ranks(self._grid.data_comm, self._waiter, total.flat)
        self._tied.add_uses(totals)
        rows = self._share(totals, stop, waited_s / run_s)
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
        for index, stage in state.stages.items():
            stage.optimizer.update(stage.parameters.weights.arrays, totals[index].arrays, step, scale, rate)
        self._gradients.reset()
        state.step = step
        bubble = float(rows[:, 1].mean())
        return StepResult(loss, norm, rate, time.perf_counter() - start, bubble, bool(rows[:, 0].any()))

    def _share(self, totals: dict[int, Arena], stop: bool, bubble: float) -> np.ndarray:
        """Give every rank the stop flags, waiting fractions, losses and sums of squares of all ranks."""
        losses = np.zeros(self._num_microbatches)
        if self._state.last_stage in self._state.stages:
            losses[:] = [self._batches[index].loss for index in range(self._num_microbatches)]
        squares = np.zeros(len(self._order))
        for index, stage in self._state.stages.items():
            for tensor in stage.owned():
                squares[self._order[tensor.name]] = sum_of_squares(totals[index].arrays[tensor.name].reshape(-1))
        return gather_rows(self._grid.comm, self._waiter, np.concatenate(([stop, bubble], losses, squares)))

    def _loss(self, rows: np.ndarray) -> float:
        """Add the losses of all microbatches in their global order."""
        grid, total = self._grid, 0.0
        for replica in range(grid.data):
            row = rows[grid.world_rank(replica, self._state.placement[-1])]
            for value in row[2 : 2 + self._num_microbatches]:
                total += float(value)
        return total / self._state.tokens_per_step

    def _norm(self, rows: np.ndarray) -> float:
        """Add the squares of all tensors in layer order; every replica has the same."""
        ranks = rows[[self._grid.world_rank(0, stage_rank) for stage_rank in range(self._grid.pipeline)]]
        # Each tensor's sum comes from one rank and is zero on the others.
        squares = ranks[:, 2 + self._num_microbatches :].sum(axis=0)
        return global_norm([float(value) for value in squares], self._state.tokens_per_step)
