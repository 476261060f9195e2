"""Training a tiny model on some ranks, for the tests that compare bits."""

import numpy as np
from mpi4py import MPI

from hpcpipe.config.check import check_stages, resolve
from hpcpipe.config.schema import Config, GuardConfig, ModelConfig, ParallelConfig, TrainConfig
from hpcpipe.kernels.threads import ALONE, Team
from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.grid import make_grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.guard import ALONE as NO_SURROUNDINGS
from hpcpipe.train.guard import Surroundings
from hpcpipe.train.session import build_schedule
from hpcpipe.train.state import State, build_state
from hpcpipe.train.step import StepResult, Trainer

CLIP = 0.1
"""Below every gradient norm of these trainings."""


class CountedSamples:
    """Samples that are a function of their number."""

    def batch(self, first, count, tokens, targets):
        for row in range(count):
            stream = np.random.default_rng(first + row).integers(0, 11, tokens.shape[1] + 1)
            tokens[row], targets[row] = stream[:-1], stream[1:]


class Training:
    """A tiny model on some ranks, ready to train."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        pipeline: int,
        data: int,
        mode: MessageMode | None = None,
        layers: int = 9,
        tied: bool = True,
        recompute: str = "none",
        width: int = 12,
        clip: float = CLIP,
        steps: int = 10,
        samples: object = None,
        team: Team = ALONE,
        precision: str = "auto",
        guard: GuardConfig | None = None,
        surroundings: Surroundings = NO_SURROUNDINGS,
        **parallel: object,
    ) -> None:
        config = Config(
            model=ModelConfig(layers=layers, width=width, heads=3, context=6, vocab=11, tied=tied),
            parallel=ParallelConfig(pipeline=pipeline, data=data, microbatch_size=2, **parallel),
            train=TrainConfig(
                steps=steps, learning_rate=1e-2, warmup_steps=1, clip=clip, recompute=recompute, precision=precision
            ),
            guard=guard or GuardConfig(),
        )
        config = resolve(config, comm.size)
        self.schedule = build_schedule(config)
        self.config = config = check_stages(config, self.schedule.num_stages)
        self.grid, chosen = make_grid(comm, pipeline, data), config.parallel
        self.state = build_state(config, self.schedule.stage_to_rank, self.grid.stage_rank, self.grid.replica, team)
        self.state.fill_initial()
        per_replica = chosen.microbatches // data
        local = range(self.grid.replica * per_replica, (self.grid.replica + 1) * per_replica)
        batches = TrainingBatches(samples or CountedSamples(), chosen.microbatches, local, 2, config.model.context)
        self.trainer = Trainer(
            self.state, self.schedule, self.grid, Waiter(60.0), batches, mode or MessageMode(), surroundings
        )
        self._step = 0

    def run(self, steps: int) -> list[StepResult]:
        """Train some more steps."""
        first = self._step + 1
        self._step += steps
        return [self.trainer.run(step) for step in range(first, self._step + 1)]

    def close(self) -> None:
        """Free the communicators; every rank calls it."""
        self.grid.free()


def train(
    comm: MPI.Intracomm, pipeline: int, data: int, steps: int, mode: MessageMode | None = None, **choices: object
) -> tuple[list[tuple[float, float]], State]:
    """Return the loss and norm of each step, and this rank's state, after a few steps."""
    training = Training(comm, pipeline, data, mode, steps=steps, **choices)
    results = training.run(steps)
    training.close()
    return [(result.loss, result.grad_norm) for result in results], training.state


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
