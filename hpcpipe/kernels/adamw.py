"""The update of AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

import math

import numpy as np

from hpcpipe.kernels.arrays import Floats
from hpcpipe.kernels.jit import kernel


@kernel
def adamw_update(
    weight: Floats,
    grad: Floats,
    moment1: Floats,
    moment2: Floats,
    scale: float,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    correction1: float,
    correction2: float,
) -> None:
    """Update weights and moments in place.

    With ``g = scale * grad``::

        moment1 = beta1 * moment1 + (1 - beta1) * g
        moment2 = beta2 * moment2 + (1 - beta2) * g * g
        weight  = weight - learning_rate * weight_decay * weight
                  - learning_rate * (moment1 / correction1) / (sqrt(moment2 / correction2) + epsilon)

    The scalars are combined in float64 and rounded once to the type of the arrays; each element then sees the same
    operations wherever it lies, so that arrays may be cut anywhere.

    Parameters
    ----------
    weight, moment1, moment2 : array, shape [n]
        Weights and moments of the gradient, updated in place.
    grad : array, shape [n]
        Gradient; left as it is.
    scale : float
        Multiplies the gradient: 1, or less where the gradient norm is clipped.
    learning_rate, epsilon, weight_decay : float
        As in the paper; the decay is decoupled from the gradient and multiplied by the learning rate.
    beta1, beta2 : float
        Decay rates of the moments.
    correction1, correction2 : float
        ``1 - beta1**step`` and ``1 - beta2**step``, steps counted from 1.
    """
    scalar = weight.dtype.type
    factor = scalar(scale)
    keep1, take1 = scalar(beta1), scalar(1.0 - beta1)
    keep2, take2 = scalar(beta2), scalar(1.0 - beta2)
    step_size = scalar(learning_rate / correction1)
    root_correction = scalar(1.0 / math.sqrt(correction2))
    small = scalar(epsilon)
    keep_weight = scalar(1.0 - learning_rate * weight_decay)
    for i in range(weight.shape[0]):
        gradient = factor * grad[i]
        first = keep1 * moment1[i] + take1 * gradient
        second = keep2 * moment2[i] + take2 * (gradient * gradient)
        moment1[i] = first
        moment2[i] = second
        weight[i] = keep_weight * weight[i] - step_size * first / (np.sqrt(second) * root_correction + small)
