"""One step: run the schedule, sum the gradients, clip, update a shard, share it. The same bits on every grid."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hpcpipe.errors import NumericsError
from hpcpipe.faults import hooks
from hpcpipe.memory.layout import Memory, new_arrays
from hpcpipe.model.layer import Arrays
from hpcpipe.model.tensors import BufferSpec, f32
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.shards import ShardExchange, receive_elements
from hpcpipe.mpi.wait import Waiter
from hpcpipe.optim.adamw import AdamW
from hpcpipe.optim.clip import clip_factor, global_norm
from hpcpipe.optim.learning_rate import learning_rate
from hpcpipe.optim.shards import Bucket, Slice
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.messages import Messages
from hpcpipe.pipeline.packed import PackedWeights
from hpcpipe.schedule.action import Schedule
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.gradients import Gradients, TiedGradients
from hpcpipe.train.norm import SquareSums
from hpcpipe.train.rows import Heard, Notes, StepRows
from hpcpipe.train.stage_tensors import StageTensors
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
    heard : Heard
        What the ranks had to tell each other.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    step_s: float
    bubble: float
    heard: Heard


@dataclass(frozen=True)
class _Agreed:
    """What the ranks agree on before the first update of a step."""

    loss: float
    grad_norm: float
    learning_rate: float
    scale: float
    bubble: float
    heard: Heard


class _Update:
    """The update of this replica's shard of a bucket."""

    def __init__(self, bucket: Bucket, held: list[Slice], optimizer: AdamW, packed: PackedWeights) -> None:
        self.bucket = bucket
        self.optimizer = optimizer
        self.packed = {
            part.name: packed.of(part.name) for part in held if part.size == part.tensor.size and part.name in packed
        }
        self._held = held

    def arrays(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Return the shard's elements: matrices that are packed as such, the others flat."""
        return {part.name: arrays[part.name] if part.name in self.packed else part.of(arrays) for part in self._held}


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
        received = new_arrays({"received": received_spec(state.stages, grid.data)}, "sums")["received"]
        self._exchange = ShardExchange(grid.data_comm, waiter, mode, received)
        waiter.background = [self._exchange.advance]
        self._updates = {
            index: [
                _Update(bucket, list(bucket.slices(grid.replica)), optimizer, stage.parameters.packed)
                for bucket, optimizer in stage.optimizers(config.train)
            ]
            for index, stage in state.stages.items()
        }
        # What other replicas update is packed when it has arrived.
        self._packed_here = {
            index: frozenset(name for update in updates for name in update.packed)
            for index, updates in self._updates.items()
        }
        self._step = 0
        self._notes: Callable[[], Notes] = Notes
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
        self.stages = state.compute_stages(config.parallel.microbatch_size, config.train.recompute, timed=True)
        self._executor = Executor(
            schedule,
            grid.stage_rank,
            self.stages,
            Messages(channel, schedule),
            work,
        )
        self._tied = TiedGradients(state, grid, channel)
        self._squares = SquareSums(state.stages, grid, waiter)
        self._rows = StepRows(state.model, schedule.num_microbatches, grid, waiter)

    @property
    def memory(self) -> Memory:
        """What its stages compute on; between steps it can be used for other things."""
        return self._executor.memory

    def run(self, step: int, notes: Callable[[], Notes] = Notes) -> StepResult:
        """Run one step.

        Parameters
        ----------
        step : int
            Counted from 1.
        notes : callable
            Gives what this rank has to tell the others, when they are about to update; the result tells every rank.

        Raises
        ------
        NumericsError
            On every rank, before the update, if the loss or the gradient is not finite.
        """
        hooks.enter_step(step)
        if hooks.active is not None:
            self._offer_to_faults()
        start = time.perf_counter()
        self._waiter.waited_s = 0.0
        self._batches.load(step)
        self._step, self._notes, self._agreed = step, notes, None
        self._executor.run()
        self._exchange.finish()
        for index, stage in self._state.stages.items():
            stage.parameters.packed.pack(self._state.team, self._packed_here[index])
        self._gradients.reset()
        self._state.step = step
        agreed = self._agree_once()
        return StepResult(
            agreed.loss,
            agreed.grad_norm,
            agreed.learning_rate,
            time.perf_counter() - start,
            agreed.bubble,
            agreed.heard,
        )

    def _offer_to_faults(self) -> None:
        for stage in self._state.stages.values():
            hooks.corrupt("weight", stage.parameters.weights.arrays.values())
            hooks.corrupt("moment", [array for moment in stage.moments.values() for array in moment.arrays.values()])

    def _reduce(self, stage: int) -> None:
        """Start to sum a stage's gradients over the replicas, each replica its shard."""
        total = self._gradients.close(stage)
        hooks.corrupt("gradient", total.arrays.values())
        for bucket in self._state.stages[stage].buckets:
            self._exchange.reduce_scatter(f"REDUCE{stage}", bucket.of(total.flat, total.offsets), bucket.cuts)
        hooks.point("reduce")

    def _update(self, stage: int) -> None:
        """Update this replica's shard of a stage, and start to share it."""
        agreed, total = self._agree_once(), self._gradients.totals[stage]
        hooks.point("update")
        weights = self._state.stages[stage].parameters.weights
        for update in self._updates[stage]:
            update.optimizer.update(
                update.arrays(weights.arrays),
                update.arrays(total.arrays),
                self._step,
                agreed.scale,
                agreed.learning_rate,
                update.packed,
                self._state.team,
            )
            bucket = update.bucket
            self._exchange.all_gather(f"STEP{stage}", bucket.of(weights.flat, weights.offsets), bucket.cuts)
        hooks.point("updated")

    def _agree_once(self) -> _Agreed:
        if self._agreed is None:
            self._agreed = self._agree()
        return self._agreed

    def _agree(self) -> _Agreed:
        """Complete the gradients, and let every rank know loss, norm and whether to stop."""
        state, train = self._state, self._state.config.train
        bubble = self._waiter.waited_s / self._executor.run_s
        hooks.point("agree")
        self._exchange.finish()
        self._tied.add_uses(self._gradients.totals)
        has_head = state.last_stage in state.stages
        losses = [self._batches[index].loss for index in range(self._num_microbatches)] if has_head else ()
        self._rows.share(self._notes(), bubble, losses, self._squares.add(self._gradients.totals))
        loss = self._rows.loss(state.placement[-1]) / state.tokens_per_step
        norm = global_norm(self._rows.squares(), state.tokens_per_step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            error = NumericsError(
                f"step {self._step}: loss {loss}, gradient norm {norm}: nothing was updated; lower train.learning_rate"
                f" ({train.learning_rate:g}) or train.clip ({train.clip:g}) and go on from the last checkpoint"
            )
            raise error.on_all()
        rate = learning_rate(train, self._step)
        scale = clip_factor(norm, train.clip) / state.tokens_per_step
        return _Agreed(loss, norm, rate, scale, self._rows.bubble(), self._rows.heard())


def received_spec(stages: Mapping[int, StageTensors], num_replicas: int) -> BufferSpec:
    """Return what sums over replicas receive into."""
    cuts = [bucket.cuts for stage in stages.values() for bucket in stage.buckets]
    largest = max(last - first for bounds in cuts for first, last in pairwise(bounds))
    return f32(receive_elements(num_replicas, largest))
