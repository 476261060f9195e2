"""One step: run the schedule, sum the gradients, clip, update a shard, share it. The same bits on every grid."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from hpcpipe.faults import hooks
from hpcpipe.memory.layout import Memory, new_arrays
from hpcpipe.model.tensors import BufferSpec, f32
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.shards import ShardExchange, receive_elements
from hpcpipe.mpi.wait import Waiter
from hpcpipe.optim.clip import clip_factor, global_norm
from hpcpipe.optim.learning_rate import learning_rate
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.messages import Messages
from hpcpipe.schedule.action import Schedule
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.gradients import Gradients, TiedGradients
from hpcpipe.train.guard import ALONE, Guard, Surroundings, Verdict
from hpcpipe.train.guard_actions import ActionGuard
from hpcpipe.train.guard_messages import MessageGuard
from hpcpipe.train.norm import SquareSums
from hpcpipe.train.rows import Heard, Notes, StepRows
from hpcpipe.train.stage_tensors import StageTensors
from hpcpipe.train.state import State
from hpcpipe.train.update import Updates


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
    is_skipped : bool
        Whether nothing was updated. The loss or the norm may be not finite then.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    step_s: float
    bubble: float
    heard: Heard
    is_skipped: bool = False


@dataclass(frozen=True)
class _Agreed:
    """What the ranks agree on before the first update of a step."""

    loss: float
    grad_norm: float
    learning_rate: float
    scale: float
    bubble: float
    heard: Heard


class _Undone(Exception):
    """Leaves the schedule before the first update, with what was agreed; every rank raises it."""

    def __init__(self, verdict: Verdict, agreed: _Agreed) -> None:
        super().__init__(verdict.value)
        self.verdict, self.agreed = verdict, agreed


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
    before_update : callable
        Called before the ranks agree on an update: what reads the state beside the schedule ends here.
    """

    def __init__(
        self,
        state: State,
        schedule: Schedule,
        grid: Grid,
        waiter: Waiter,
        batches: TrainingBatches,
        mode: MessageMode,
        surroundings: Surroundings = ALONE,
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
        messages = MessageGuard(grid, waiter) if config.guard.messages else None
        between_replicas = messages.between_replicas if messages is not None else None
        self._exchange = ShardExchange(grid.data_comm, waiter, mode, received, between_replicas)
        waiter.background = [self._exchange.advance]
        self._updates = Updates(state, grid.replica, self._exchange)
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
            begin=waiter.watch.begin,
            end=waiter.watch.end,
        )
        in_pipeline = messages.in_pipeline if messages is not None else None
        channel = Channel(grid.pipeline_comm, waiter, mode, in_pipeline, "message")
        self.stages = state.compute_stages(config.parallel.microbatch_size, config.train.recompute, timed=True)
        self.before_update: Callable[[], None] = lambda: None
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
        layers = {index: stage.layers for index, stage in state.stages.items()}
        actions = ActionGuard(
            *(work, schedule, state.model, layers, grid, waiter), config.run.seed, config.guard.recompute_every
        )
        self._guard = Guard(state, grid, waiter, self._rows, actions, messages, surroundings)

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
        NumericsError, Interruption, RankError
            On every rank, before the update: see `hpcpipe.train.guard.Guard.judge`.
        """
        hooks.enter_step(step)
        self._guard.begin(step)
        if hooks.active is not None:
            self._offer_to_faults()
        start = time.perf_counter()
        self._step, self._notes = step, notes
        agreed, is_skipped = self._walk()
        if not is_skipped:
            self._updates.finish()
        self._gradients.reset()
        self._state.step = step
        if is_skipped:
            self._guard.skipped()
        else:
            self._guard.updated()
        return StepResult(
            agreed.loss,
            agreed.grad_norm,
            agreed.learning_rate,
            time.perf_counter() - start,
            agreed.bubble,
            agreed.heard,
            is_skipped,
        )

    def require_sound_state(self) -> None:
        """Look whether the state is what the last update has left, before it is kept; all ranks call it.

        Raises
        ------
        Interruption, RankError
            On every rank: see `hpcpipe.train.guard.Guard.look_again`.
        """
        self._guard.look_again()

    def _walk(self) -> tuple[_Agreed, bool]:
        """Walk the schedule until all ranks are content with it; return what they agreed on, and if it is skipped."""
        while True:
            self._waiter.waited_s = 0.0
            self._batches.load(self._step)
            self._agreed = None
            self._guard.begin_try()
            try:
                self._executor.run()
                return self._agree_once(), False
            except _Undone as undone:
                if undone.verdict is Verdict.SKIP:
                    return undone.agreed, True
            self._gradients.reset()

    def _offer_to_faults(self) -> None:
        for stage in self._state.stages.values():
            hooks.corrupt("weight", stage.parameters.weights.arrays.values())
            hooks.corrupt("moment", [array for moment in stage.moments.values() for array in moment.arrays.values()])

    def _reduce(self, stage: int) -> None:
        """Start to sum a stage's gradients over the replicas, each replica its shard."""
        total = self._gradients.close(stage)
        hooks.corrupt("gradient", total.arrays.values())
        self._guard.actions.check_sum(stage, total.flat)
        for bucket in self._state.stages[stage].buckets:
            self._exchange.reduce_scatter(f"REDUCE{stage}", bucket.of(total.flat, total.offsets), bucket.cuts)
        hooks.point("reduce")

    def _update(self, stage: int) -> None:
        """Update this replica's shard of a stage, and start to share it."""
        agreed = self._agree_once()
        hooks.point("update")
        self._updates.run(stage, self._gradients.totals, self._step, agreed.scale, agreed.learning_rate)
        hooks.point("updated")

    def _agree_once(self) -> _Agreed:
        if self._agreed is None:
            self._agreed = self._agree()
            self._guard.updating()
        return self._agreed

    def _agree(self) -> _Agreed:
        """Complete the gradients, and let every rank know loss, norm and whether to stop."""
        state, train = self._state, self._state.config.train
        bubble = self._waiter.waited_s / self._executor.run_s
        self.before_update()
        hooks.point("agree")
        # While the last messages between ranks are under way.
        self._guard.look()
        self._exchange.finish()
        self._tied.add_uses(self._gradients.totals)
        has_head = state.last_stage in state.stages
        losses = [self._batches[index].loss for index in range(self._num_microbatches)] if has_head else ()
        squares = self._squares.add(self._gradients.totals)
        self._rows.share(self._notes(), bubble, losses, squares, self._guard.checks())
        loss = self._rows.loss(state.placement[-1]) / state.tokens_per_step
        norm = global_norm(self._rows.squares(), state.tokens_per_step)
        scale = clip_factor(norm, train.clip) / state.tokens_per_step
        rate = learning_rate(train, self._step)
        agreed = _Agreed(loss, norm, rate, scale, self._rows.bubble(), self._rows.heard())
        verdict = self._guard.judge(loss, norm)
        if verdict is not Verdict.UPDATE:
            raise _Undone(verdict, agreed)
        return agreed


def received_spec(stages: Mapping[int, StageTensors], num_replicas: int) -> BufferSpec:
    """Return what sums over replicas receive into."""
    cuts = [bucket.cuts for stage in stages.values() for bucket in stage.buckets]
    largest = max(last - first for bounds in cuts for first, last in pairwise(bounds))
    return f32(receive_elements(num_replicas, largest))
