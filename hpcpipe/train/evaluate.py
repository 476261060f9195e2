"""Evaluation: the mean loss on the held-out tokens, by a forward-only schedule."""

import math
from dataclasses import dataclass

import numpy as np

from hpcpipe.data.windows import HeldOut
from hpcpipe.memory.layout import Memory
from hpcpipe.model.layer import Arrays, Microbatch
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.messages import Messages
from hpcpipe.pipeline.stage import Stash
from hpcpipe.schedule.build import build_forward
from hpcpipe.train.batches import held_out_loader
from hpcpipe.train.state import State


def no_gradients(stage: int, index: int) -> list[Arrays]:
    """Refuse: a forward-only schedule has no backward."""
    raise AssertionError("a forward-only schedule asked for gradients")


@dataclass(frozen=True)
class Evaluation:
    """What every rank knows after an evaluation.

    Attributes
    ----------
    val_loss : float
        Mean negative log-likelihood per held-out token, in nats.
    bits_per_byte : float
        The same information per byte of held-out text, comparable between tokenizers and with compressors.
    """

    val_loss: float
    bits_per_byte: float


class Evaluator:
    """Evaluates on one rank.

    Parameters
    ----------
    state : State
        Weights; only read.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    held_out : HeldOut
        The held-out samples.
    mode : MessageMode
        How messages are sent.
    memory : Memory, optional
        What it computes on while it runs, as the trainer does otherwise; without it the evaluator has its own.
    """

    def __init__(
        self,
        state: State,
        grid: Grid,
        waiter: Waiter,
        held_out: HeldOut,
        mode: MessageMode,
        memory: Memory | None = None,
    ) -> None:
        batch, context = state.config.parallel.microbatch_size, state.config.model.context
        self._grid = grid
        self._waiter = waiter
        self._held_out = held_out
        self._last_stage = state.last_stage
        self._last_rank = state.placement[-1]
        num_microbatches = math.ceil(held_out.num_samples / batch / grid.data)
        schedule = build_forward(state.placement, num_microbatches)
        load = held_out_loader(held_out, grid.replica * num_microbatches, batch, context)
        self._losses = np.zeros(num_microbatches)
        messages = Messages(Channel(grid.pipeline_comm, waiter, mode), schedule)
        self._executor = Executor(
            schedule,
            grid.stage_rank,
            state.compute_stages(batch),
            messages,
            Work(
                load=load,
                gradients=no_gradients,
                finished=self._finished,
                begin=waiter.watch.begin,
                end=waiter.watch.end,
            ),
            memory,
        )

    def run(self) -> Evaluation:
        """Run every held-out sample forward; every rank calls it and gets the same bits, whatever the grid."""
        self._executor.run()
        rows = gather_rows(self._grid.comm, self._waiter, self._losses)
        total = 0.0
        for replica in range(self._grid.data):
            for value in rows[self._grid.world_rank(replica, self._last_rank)]:
                total += float(value)
        bits = total / math.log(2)
        return Evaluation(total / self._held_out.num_predictions, bits / max(1, self._held_out.num_bytes))

    def _finished(self, stage: int, index: int, microbatch: Microbatch, stash: Stash) -> None:
        if stage == self._last_stage:
            self._losses[index] = microbatch.loss
