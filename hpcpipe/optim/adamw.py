"""AdamW over the tensors of a stage (Loshchilov & Hutter, arXiv 1711.05101)."""

from collections.abc import Mapping, Sequence

import numpy as np

from hpcpipe.config.schema import TrainConfig
from hpcpipe.kernels.adamw import adamw_update
from hpcpipe.memory.arena import Arena
from hpcpipe.model.tensors import TensorSpec

EPSILON = 1e-8
MOMENTS = ("moment1", "moment2")


class AdamW:
    """The optimizer's state for a stage.

    Parameters
    ----------
    tensors : sequence of TensorSpec
        The tensors with storage on this stage.
    train : TrainConfig
        Decay rates of the moments, weight decay.

    Attributes
    ----------
    moments : dict of str to Arena
        ``moment1`` and ``moment2``: running means of the gradient and its square, under global names.
    """

    def __init__(self, tensors: Sequence[TensorSpec], train: TrainConfig) -> None:
        self._tensors = tensors
        self._train = train
        self.moments = {moment: Arena({tensor.name: tensor.shape for tensor in tensors}) for moment in MOMENTS}

    def update(
        self,
        weights: Mapping[str, np.ndarray],
        gradients: Mapping[str, np.ndarray],
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
                self.moments["moment1"].arrays[tensor.name].reshape(-1),
                self.moments["moment2"].arrays[tensor.name].reshape(-1),
                scale,
                learning_rate,
                beta1,
                beta2,
                EPSILON,
                self._train.weight_decay if tensor.decays else 0.0,
                1.0 - beta1**step,
                1.0 - beta2**step,
            )
