"""Training a tiny model on some ranks, for the tests that compare bits."""

import numpy as np
from mpi4py import MPI

from hpcpipe.config.check import check_stages, resolve
from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.grid import make_grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.session import build_schedule
from hpcpipe.train.state import State, build_state
from hpcpipe.train.step import Trainer

CLIP = 0.1
"""Below every gradient norm of these trainings."""


class CountedSamples:
    """Samples that are a function of their number."""

    def batch(self, first, count, tokens, targets):
        for row in range(count):
            stream = np.random.default_rng(first + row).integers(0, 11, tokens.shape[1] + 1)
            tokens[row], targets[row] = stream[:-1], stream[1:]


def train(
    comm: MPI.Intracomm,
    pipeline: int,
    data: int,
    steps: int,
    mode: MessageMode | None = None,
    layers: int = 9,
    tied: bool = True,
    recompute: str = "none",
    width: int = 12,
    clip: float = CLIP,
    **parallel: object,
) -> tuple[list[tuple[float, float]], State]:
    """Return the loss and norm of each step, and this rank's state, after a few steps."""
    config = Config(
        model=ModelConfig(layers=layers, width=width, heads=3, context=6, vocab=11, tied=tied),
        parallel=ParallelConfig(pipeline=pipeline, data=data, microbatch_size=2, **parallel),
        train=TrainConfig(steps=steps, learning_rate=1e-2, warmup_steps=1, clip=clip, recompute=recompute),
    )
    config = resolve(config, comm.size)
    schedule = build_schedule(config)
    config = check_stages(config, schedule.num_stages)
    grid, chosen = make_grid(comm, pipeline, data), config.parallel
    state = build_state(config, schedule.stage_to_rank, grid.stage_rank, grid.replica)
    state.fill_initial()
    per_replica = chosen.microbatches // data
    local = range(grid.replica * per_replica, (grid.replica + 1) * per_replica)
    batches = TrainingBatches(CountedSamples(), chosen.microbatches, local, 2, config.model.context)
    trainer = Trainer(state, schedule, grid, Waiter(60.0), batches, mode or MessageMode())
    results = [trainer.run(step, stop=False) for step in range(1, steps + 1)]
    grid.free()
    return [(result.loss, result.grad_norm) for result in results], state


def owned_weights(state: State) -> dict[str, bytes]:
    """Return the bytes of the tensors that this rank owns, by name."""
    return {
        tensor.name: stage.parameters.weights.arrays[tensor.name].tobytes()
        for stage in state.stages.values()
        for tensor in stage.owned()
    }


def all_weights(state: State) -> list[tuple[str, bytes]]:
    """Return every tensor with storage on this rank; the copy of a tied one under the name of its original."""
    return [
        (tensor.tied_to or tensor.name, stage.parameters.weights.arrays[tensor.name].tobytes())
        for stage in state.stages.values()
        for tensor in stage.parameters.layout.stored
    ]
