"""Sums, each in one fixed order."""

import numpy as np

from hpcpipe.kernels.arrays import Floats
from hpcpipe.kernels.jit import kernel

BLOCK = 1024
"""Elements whose squares are added by themselves in `block_sums_of_squares`."""


@kernel
def add_into(acc: Floats, x: Floats) -> None:
    """Compute ``acc += x``.

    Parameters
    ----------
    acc : array, shape [n]
        Added to in place.
    x : array, shape [n]
        What is added.
    """
    for i in range(acc.shape[0]):
        acc[i] += x[i]


@kernel(reorder=True)
def sum_of_squares(x: Floats) -> float:
    """Sum the squares of all elements in float64.

    Parameters
    ----------
    x : array, shape [n]
        Terms.

    Returns
    -------
    float
        The sum; its order is a function of n and of the processor alone.
    """
    total = 0.0
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        total += value * value
    return total


@kernel(reorder=True)
def block_sums_of_squares(x: Floats, out: Floats) -> None:
    """Sum the squares of each run of ``BLOCK`` elements in float64.

    A part of an array that starts at a multiple of ``BLOCK`` gives the same sums as the whole array gives for it.

    Parameters
    ----------
    x : array, shape [n]
        Terms.
    out : array of float64, shape [n / BLOCK, rounded up]
        The sums; the order of each is a function of its number of terms and of the processor alone.
    """
    for block in range(out.shape[0]):
        total = 0.0
        for i in range(block * BLOCK, min(block * BLOCK + BLOCK, x.shape[0])):
            value = np.float64(x[i])
            total += value * value
        out[block] = total


@kernel
def bias_gradient(dy: Floats, acc: Floats, scratch: Floats) -> None:
    """Add the sum of all rows to ``acc``: the gradient of a bias that was added to every row.

    The rows are summed first, from row 0 upwards, and the sum is then added.

    Parameters
    ----------
    dy : array, shape [R, N]
        Gradient of the output.
    acc : array, shape [N]
        Gradient of the bias, added to in place.
    scratch : array, shape [N]
        Working space; its contents are lost.
    """
    scratch[:] = 0
    for row in range(dy.shape[0]):
        for column in range(dy.shape[1]):
            scratch[column] += dy[row, column]
    for column in range(dy.shape[1]):
        acc[column] += scratch[column]
