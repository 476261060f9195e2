"""The global gradient norm, exact across stages, and the factor that clips it."""

import math
from collections.abc import Sequence


def global_norm(sums_of_squares: Sequence[float], num_tokens: float) -> float:
    """Return the norm of the mean gradient.

    Parameters
    ----------
    sums_of_squares : sequence of float
        One per tensor of the model, in layer order: the order in which they are added, whatever the stages.
    num_tokens : float
        What the summed gradient is divided by to give the gradient of the mean loss.
    """
    total = 0.0
    for value in sums_of_squares:
        total += value
    return math.sqrt(total) / num_tokens


def clip_factor(norm: float, clip: float) -> float:
    """Return what gradients are multiplied with so that their norm is at most `clip` (0: never clipped)."""
    return clip / norm if clip > 0 and norm > clip else 1.0
