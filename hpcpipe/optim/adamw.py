"""AdamW over the tensors of a stage (Loshchilov & Hutter, arXiv 1711.05101)."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from hpcpipe.config.schema import TrainConfig
from hpcpipe.kernels.adamw import adamw_update

EPSILON = 1e-8
MOMENTS = ("moment1", "moment2")
Arrays = Mapping[str, np.ndarray]


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
        """
        beta1, beta2 = self._train.betas
        for tensor in self._tensors:
            adamw_update(
                weights[tensor.name].reshape(-1),
                gradients[tensor.name].reshape(-1),
                self._moments[0][tensor.name].reshape(-1),
                self._moments[1][tensor.name].reshape(-1),
                scale,
                learning_rate,
                beta1,
                beta2,
                EPSILON,
                self._train.weight_decay if tensor.decays else 0.0,
                1.0 - beta1**step,
                1.0 - beta2**step,
            )
