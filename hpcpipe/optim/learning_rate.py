"""The learning rate of each step: linear warmup, then a cosine."""

import math

from hpcpipe.config.schema import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1.

    It rises linearly over `warmup_steps`, falls along half a cosine to `min_learning_rate` at `decay_steps`
    (Loshchilov & Hutter, arXiv 1608.03983, without restarts), and stays there.

    Parameters
    ----------
    train : TrainConfig
        With `decay_steps` resolved (not 0).
    step : int
        The step, at least 1.
    """
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    if step >= train.decay_steps:
        return train.min_learning_rate
    progress = (step - train.warmup_steps) / (train.decay_steps - train.warmup_steps)
    span = train.learning_rate - train.min_learning_rate
    return train.min_learning_rate + 0.5 * span * (1.0 + math.cos(math.pi * progress))
