"""AdamW over the tensors of a stage (Loshchilov & Hutter, arXiv 1711.05101)."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np

from hpcpipe.config.schema import TrainConfig
from hpcpipe.kernels.adamw import adamw_update
from hpcpipe.kernels.adamw_bf16 import adamw_pack
from hpcpipe.kernels.threads import ALONE, Team

EPSILON = 1e-8
MOMENTS = ("moment1", "moment2")
Arrays = Mapping[str, np.ndarray]
Panels = tuple[np.ndarray, np.ndarray]


class Tensor(Protocol):
    """What the optimizer needs to know of a parameter tensor."""

    @property
    def name(self) -> str:
        """Its global name."""
        ...

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        ...


class AdamW:
    """The optimizer's state for a stage.

    Parameters
    ----------
    tensors : sequence of Tensor
        The tensors with storage on this stage.
    moments : mapping of str to mapping of ndarray
        ``moment1`` and ``moment2``: running means of the gradient and its square, under global names; the caller's,
        updated in place.
    train : TrainConfig
        Decay rates of the moments, weight decay.
    """

    def __init__(self, tensors: Sequence[Tensor], moments: Mapping[str, Arrays], train: TrainConfig) -> None:
        self._tensors = tensors
        self._moments = [moments[moment] for moment in MOMENTS]
        self._train = train

    def update(
        self,
        weights: Arrays,
        gradients: Arrays,
        step: int,
        scale: float,
        learning_rate: float,
        packed: Mapping[str, Panels] = MappingProxyType({}),
        team: Team = ALONE,
    ) -> None:
        """Update all tensors in place.

        Parameters
        ----------
        weights, gradients : mapping of ndarray
            Under global names. Gradients are sums over tokens.
        step : int
            The step, counted from 1, for the bias correction.
        scale : float
            What gradients are multiplied with: the clip factor over the number of tokens.
        learning_rate : float
            The step's learning rate.
        packed : mapping of str to (ndarray, ndarray)
            Panels of whole matrices, as `hpcpipe.pipeline.packed` keeps them: packed again in the same pass.
        team : Team
            The threads of the rank.
        """
        beta1, beta2 = self._train.betas
        for tensor in self._tensors:
            weight, gradient = weights[tensor.name], gradients[tensor.name]
            moments = [moments[tensor.name] for moments in self._moments]
            decay = self._train.weight_decay if tensor.decays else 0.0
            rates = (scale, learning_rate, beta1, beta2, EPSILON, decay, 1.0 - beta1**step, 1.0 - beta2**step)
            if tensor.name in packed:
                matrices = (weight, gradient, *(moment.reshape(weight.shape) for moment in moments))
                team.run(adamw_pack, len(weight), *matrices, *rates, *packed[tensor.name])
            else:
                flat = [array.reshape(-1) for array in (weight, gradient, *moments)]
                team.run(_update_range, weight.size, flat, rates)


def _update_range(arrays: Sequence[np.ndarray], rates: tuple[float, ...], first: int, last: int) -> None:
    weight, gradient, moment1, moment2 = (array[first:last] for array in arrays)
    adamw_update(weight, gradient, moment1, moment2, *rates)
