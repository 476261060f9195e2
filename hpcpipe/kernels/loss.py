"""Cross-entropy with a coefficient per row.

Shapes: R rows, V vocabulary. A row's coefficient is its weight in the loss: one over the number of tokens of the
whole batch in pre-training, zero for a row that does not count.
"""

import math

import numpy as np

from hpcpipe.kernels.arrays import Floats, Tokens
from hpcpipe.kernels.exponential import exp
from hpcpipe.kernels.jit import kernel


@kernel(reorder=True)
def cross_entropy_forward(logits: Floats, targets: Tokens, coefficients: Floats, lse: Floats) -> float:
    """Sum ``-coefficient * log(softmax(logits)[target])`` over the rows, in float64 from row 0 upwards.

    Parameters
    ----------
    logits : array, shape [R, V]
        Scores of each token.
    targets : int32 array, shape [R]
        The right token; anything where the coefficient is zero.
    coefficients : array, shape [R]
        Weight of each row; a row of weight zero adds exactly nothing.
    lse : array, shape [R]
        Overwritten with the logarithm of the sum of the exponentials of each row, which the backward takes.

    Returns
    -------
    float
        The sum.
    """
    vocab = logits.shape[1]
    loss = 0.0
    for row in range(logits.shape[0]):
        highest = logits[row, 0]
        for v in range(1, vocab):
            if logits[row, v] > highest:
                highest = logits[row, v]
        total = logits.dtype.type(0)
        for v in range(vocab):
            total += exp(logits[row, v] - highest)
        log_total = math.log(np.float64(total))
        lse[row] = np.float64(highest) + log_total
        if coefficients[row] != 0:
            distance = np.float64(highest) - np.float64(logits[row, targets[row]])
            loss += np.float64(coefficients[row]) * (distance + log_total)
    return loss


@kernel
def cross_entropy_backward(logits: Floats, targets: Tokens, coefficients: Floats, lse: Floats, dlogits: Floats) -> None:
    """Compute ``dlogits = coefficient * (softmax(logits) - onehot(target))``.

    Parameters
    ----------
    logits : array, shape [R, V]
        Scores of each token.
    targets : int32 array, shape [R]
        The right token; anything where the coefficient is zero.
    coefficients : array, shape [R]
        Weight of each row; a row of weight zero gets exact zeros.
    lse : array, shape [R]
        What the forward stored.
    dlogits : array, shape [R, V]
        Overwritten; may be ``logits``.
    """
    vocab = logits.shape[1]
    for row in range(logits.shape[0]):
        coefficient = coefficients[row]
        if coefficient == 0:
            for v in range(vocab):
                dlogits[row, v] = 0
            continue
        row_lse = lse[row]
        # Copied first, so that the costly loop is the same vector code whether or not dlogits is logits.
        for v in range(vocab):
            dlogits[row, v] = logits[row, v]
        for v in range(vocab):
            dlogits[row, v] = coefficient * exp(dlogits[row, v] - row_lse)
        dlogits[row, targets[row]] -= coefficient
