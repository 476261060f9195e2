"""What a rank trains: its stages of the model, their weights, and the optimizer's state."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hpcpipe.config.schema import Config
from hpcpipe.memory.arena import Arena
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.initial import fill_initial
from hpcpipe.model.layer import Layer
from hpcpipe.model.partition import partition
from hpcpipe.model.tensors import TensorSpec
from hpcpipe.optim.adamw import MOMENTS, AdamW
from hpcpipe.pipeline.parameters import Parameters
from hpcpipe.pipeline.stage import Stage

WEIGHT = "weight"


@dataclass(frozen=True)
class StageState:
    """What is trained of one stage.

    Attributes
    ----------
    layers : tuple of Layer
        The stage's layers.
    parameters : Parameters
        Their weights.
    moments : dict of str to Arena
        AdamW's two moments of each stored tensor.
    optimizer : AdamW
        Updates both.
    """

    layers: tuple[Layer, ...]
    parameters: Parameters
    moments: dict[str, Arena]
    optimizer: AdamW

    def owned(self) -> Iterator[TensorSpec]:
        """Yield the tensors that this stage writes to checkpoints: not the copy of a tied one."""
        return (tensor for tensor in self.parameters.layout.stored if not tensor.tied_to)

    def arrays(self, tensor: TensorSpec) -> Iterator[tuple[str, np.ndarray]]:
        """Yield a stored tensor's weight and moments with the names of their kinds."""
        yield WEIGHT, self.parameters.weights.arrays[tensor.name]
        for moment in MOMENTS:
            yield moment, self.moments[moment].arrays[tensor.name]


@dataclass
class State:
    """The part of the training state that one rank holds.

    Attributes
    ----------
    config : Config
        Resolved, with the vocabulary.
    model : tuple of Layer
        All layers of the model.
    placement : tuple of int
        The pipeline rank of each stage.
    stages : dict of int to StageState
        The stages of this rank.
    step : int
        Last finished step.
    """

    config: Config
    model: tuple[Layer, ...]
    placement: tuple[int, ...]
    stages: dict[int, StageState]
    step: int = 0

    @property
    def last_stage(self) -> int:
        """The stage with the head."""
        return len(self.placement) - 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on, over all replicas."""
        parallel = self.config.parallel
        return parallel.microbatches * parallel.microbatch_size * self.config.model.context

    def fill_initial(self) -> None:
        """Set the starting weights; the moments are zero."""
        for stage in self.stages.values():
            for tensor in stage.parameters.layout.stored:
                fill_initial(tensor, self.config.run.seed, stage.parameters.weights.arrays[tensor.name])

    def compute_stages(self, batch: int, recompute: bool = False) -> dict[int, Stage]:
        """Return this rank's stages ready to compute on microbatches of `batch` samples."""
        model = self.config.model
        return {
            index: Stage(stage.layers, stage.parameters, batch, model.context, model.width, recompute)
            for index, stage in self.stages.items()
        }


def build_state(config: Config, placement: Sequence[int], stage_rank: int) -> State:
    """Allocate the state of a pipeline rank.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.
    placement : sequence of int
        The pipeline rank of each stage.
    stage_rank : int
        This rank's place in its pipeline.
    """
    model = build_layers(config.model)
    cut = config.parallel.partition
    ranges = partition(model, len(placement), None if isinstance(cut, str) else cut)
    held = [stage for stage, rank in enumerate(placement) if rank == stage_rank]
    stages = {stage: _build_stage(config, model[ranges[stage].start : ranges[stage].stop]) for stage in held}
    return State(config, model, tuple(placement), stages)


def _build_stage(config: Config, layers: tuple[Layer, ...]) -> StageState:
    parameters = Parameters(layers)
    stored = parameters.layout.stored
    moments = {moment: Arena({tensor.name: tensor.shape for tensor in stored}) for moment in MOMENTS}
    optimizer = AdamW(stored, {moment: arena.arrays for moment, arena in moments.items()}, config.train)
    return StageState(layers, parameters, moments, optimizer)
