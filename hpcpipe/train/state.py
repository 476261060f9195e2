"""What a rank trains: its stage of the model, the weights, and the optimizer's state."""

from collections.abc import Iterator
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

WEIGHT = "weight"


@dataclass
class State:
    """The part of the training state that one rank holds.

    Attributes
    ----------
    config : Config
        Resolved, with the vocabulary.
    model : tuple of Layer
        All layers of the model.
    layer_range : range
        The layers of this rank's stage.
    parameters : Parameters
        Their weights.
    moments : dict of str to Arena
        AdamW's two moments of each stored tensor.
    optimizer : AdamW
        Updates both.
    step : int
        Last finished step.
    """

    config: Config
    model: tuple[Layer, ...]
    layer_range: range
    parameters: Parameters
    moments: dict[str, Arena]
    optimizer: AdamW
    step: int = 0

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of this rank's stage."""
        return self.model[self.layer_range.start : self.layer_range.stop]

    def owned(self) -> Iterator[TensorSpec]:
        """Yield the tensors that this stage writes to checkpoints: not the copy of a tied one."""
        return (tensor for tensor in self.parameters.layout.stored if not tensor.tied_to)

    def arrays(self, tensor: TensorSpec) -> Iterator[tuple[str, np.ndarray]]:
        """Yield a stored tensor's weight and moments with the names of their kinds."""
        yield WEIGHT, self.parameters.weights.arrays[tensor.name]
        for moment in MOMENTS:
            yield moment, self.moments[moment].arrays[tensor.name]

    def fill_initial(self) -> None:
        """Set the starting weights; the moments are zero."""
        for tensor in self.parameters.layout.stored:
            fill_initial(tensor, self.config.run.seed, self.parameters.weights.arrays[tensor.name])

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on, over all replicas."""
        parallel = self.config.parallel
        return parallel.microbatches * parallel.microbatch_size * self.config.model.context


def build_state(config: Config, stage_rank: int) -> State:
    """Allocate the state of a pipeline rank.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.
    stage_rank : int
        The rank's place in its pipeline.
    """
    model = build_layers(config.model)
    cut = config.parallel.partition
    ranges = partition(model, config.parallel.pipeline, None if isinstance(cut, str) else cut)
    layer_range = ranges[stage_rank]
    parameters = Parameters(model[layer_range.start : layer_range.stop])
    stored = parameters.layout.stored
    moments = {moment: Arena({tensor.name: tensor.shape for tensor in stored}) for moment in MOMENTS}
    optimizer = AdamW(stored, {moment: arena.arrays for moment, arena in moments.items()}, config.train)
    return State(config, model, layer_range, parameters, moments, optimizer)
