"""One step: run the schedule, sum the gradients, clip, update a shard, share it. The same bits on every grid."""

import math
import time
from dataclasses import dataclass

import numpy as np

from hpcpipe.errors import NumericsError
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.shards import ShardExchange
from hpcpipe.mpi.wait import Waiter
from hpcpipe.optim.clip import clip_factor, global_norm
from hpcpipe.optim.learning_rate import learning_rate
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.messages import Messages
from hpcpipe.schedule.action import Schedule
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.gradients import Gradients, TiedGradients
from hpcpipe.train.norm import SquareSums
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


@dataclass(frozen=True)
class _Agreed:
    """What the ranks agree on before the first update of a step."""

    loss: float
    grad_norm: float
    learning_rate: float
    scale: float
    bubble: float
    stop: bool


class Trainer:
    """Runs training steps on one rank.

    Parameters
    ----------
    state : State
        Weights, and the moments of this replica's shard; updated in place.
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

    Attributes
    ----------
    stages : dict of int to Stage
        What computes; its layers are `hpcpipe.train.stopwatch.TimedLayer`.
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
        assert all(stage.shard == grid.replica for stage in state.stages.values())
        self._gradients = Gradients(state, config.parallel.lanes // grid.data, schedule.num_microbatches)
        buckets = [bucket for stage in state.stages.values() for bucket in stage.buckets]
        largest = max(int(np.diff(bucket.cuts).max()) for bucket in buckets)
        self._exchange = ShardExchange(grid.data_comm, waiter, mode, largest)
        waiter.background = self._exchange.advance
        self._optimizers = {index: stage.optimizers(config.train) for index, stage in state.stages.items()}
        self._step, self._stop = 0, False
        self._agreed: _Agreed | None = None
        work = Work(
            load=batches.__getitem__,
            gradients=self._gradients.of_layers,
            finished=lambda stage, index, microbatch, stash: self._gradients.finished(stage, index),
            reduce=self._reduce,
            step=self._update,
            poll=self._exchange.advance,
        )
        channel = Channel(grid.pipeline_comm, waiter, mode)
        recompute = config.train.recompute == "full"
        self.stages = state.compute_stages(config.parallel.microbatch_size, recompute, timed=True)
        self._executor = Executor(
            schedule,
            grid.stage_rank,
            self.stages,
            Messages(channel, schedule),
            work,
        )
        self._tied = TiedGradients(state, grid, channel)
        self._squares = SquareSums(state, grid, waiter)
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
        self._waiter.waited_s = 0.0
        self._batches.load(step)
        self._step, self._stop, self._agreed = step, stop, None
        self._executor.run()
        self._exchange.finish()
        self._state.pack()
        self._gradients.reset()
        self._state.step = step
        agreed = self._agree_once()
        return StepResult(
            agreed.loss,
            agreed.grad_norm,
            agreed.learning_rate,
            time.perf_counter() - start,
            agreed.bubble,
            agreed.stop,
        )

    def _reduce(self, stage: int) -> None:
        """Start to sum a stage's gradients over the replicas, each replica its shard."""
        total = self._gradients.close(stage)
        for bucket in self._state.stages[stage].buckets:
            self._exchange.reduce_scatter(f"REDUCE{stage}", bucket.of(total.flat, total.offsets), bucket.cuts)

    def _update(self, stage: int) -> None:
        """Update this replica's shard of a stage, and start to share it."""
        agreed, total = self._agree_once(), self._gradients.totals[stage]
        weights = self._state.stages[stage].parameters.weights
        for bucket, optimizer in self._optimizers[stage]:
            held = list(bucket.slices(self._grid.replica))
            optimizer.update(
                {part.name: part.of(weights.arrays) for part in held},
                {part.name: part.of(total.arrays) for part in held},
                self._step,
                agreed.scale,
                agreed.learning_rate,
            )
            self._exchange.all_gather(f"STEP{stage}", bucket.of(weights.flat, weights.offsets), bucket.cuts)

    def _agree_once(self) -> _Agreed:
        if self._agreed is None:
            self._agreed = self._agree()
        return self._agreed

    def _agree(self) -> _Agreed:
        """Complete the gradients, and let every rank know loss, norm and whether to stop."""
        state, train = self._state, self._state.config.train
        bubble = self._waiter.waited_s / self._executor.run_s
        self._exchange.finish()
        self._tied.add_uses(self._gradients.totals)
        rows = self._share(bubble)
        loss, norm = self._loss(rows), self._norm(rows)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            error = NumericsError(
                f"step {self._step}: loss {loss}, gradient norm {norm}: nothing was updated; lower train.learning_rate"
                f" ({train.learning_rate:g}) or train.clip ({train.clip:g}) and go on from the last checkpoint"
            )
            error.on_all_ranks = True
            raise error
        rate = learning_rate(train, self._step)
        scale = clip_factor(norm, train.clip) / state.tokens_per_step
        return _Agreed(loss, norm, rate, scale, float(rows[:, 1].mean()), bool(rows[:, 0].any()))

    def _share(self, bubble: float) -> np.ndarray:
        """Give every rank the stop flags, waiting fractions, losses and sums of squares of all ranks."""
        losses = np.zeros(self._num_microbatches)
        if self._state.last_stage in self._state.stages:
            losses[:] = [self._batches[index].loss for index in range(self._num_microbatches)]
        squares = np.zeros(len(self._order))
        for name, value in self._squares.add(self._gradients.totals).items():
            squares[self._order[name]] = value
        return gather_rows(self._grid.comm, self._waiter, np.concatenate(([self._stop, bubble], losses, squares)))

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
