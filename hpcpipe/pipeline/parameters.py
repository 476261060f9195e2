"""The parameters of one stage: weights, and where the optimizer finds each tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcpipe.memory.arena import Arena
from hpcpipe.model.layer import Layer
from hpcpipe.model.tensors import TensorSpec
from hpcpipe.pipeline.packed import PackedWeights


@dataclass(frozen=True)
class ParameterLayout:
    """Which tensors a stage uses, and which of them have storage here.

    Attributes
    ----------
    used : tuple of TensorSpec
        Every use of a tensor, in layer order; each has a gradient of its own.
    stored : tuple of TensorSpec
        Those with values here: all but a tied tensor whose original is on the same stage.
    """

    used: tuple[TensorSpec, ...]
    stored: tuple[TensorSpec, ...]


def layout_of(layers: Sequence[Layer]) -> ParameterLayout:
    """Return the layout of a stage's layers."""
    used = tuple(tensor for layer in layers for tensor in layer.tensors)
    names = {tensor.name for tensor in used}
    return ParameterLayout(used, tuple(tensor for tensor in used if tensor.tied_to not in names))


class Parameters:
    """The weights of a stage in one block of memory.

    Parameters
    ----------
    layers : sequence of Layer
        The stage's layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layout = layout_of(layers)
        self.weights = Arena({tensor.name: tensor.shape for tensor in self.layout.stored}, "weights")
        self.packed = PackedWeights(layers, self.weights.arrays)

    def weights_of(self, layer: Layer) -> dict[str, np.ndarray]:
        """Return a layer's weights and panels under local names; a tied one is the original where that is here."""
        arrays = self.weights.arrays
        weights = {
            tensor.name.removeprefix(layer.prefix): arrays[tensor.name if tensor.name in arrays else tensor.tied_to]
            for tensor in layer.tensors
        }
        return {**weights, **dict(self.packed.views(layer))}

    def new_gradients(self) -> Arena:
        """Return zeroed memory for the gradient of every use of a tensor, under global names."""
        return Arena({tensor.name: tensor.shape for tensor in self.layout.used}, "gradients")
