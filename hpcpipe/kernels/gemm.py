"""Matrix products, through the BLAS that numba calls.

Shapes: M, K, N sides of a product, R rows. Operands are C-contiguous; a transposed one is handed to the BLAS as
such and is not copied.
"""

import numpy as np

from hpcpipe.kernels.arrays import Floats
from hpcpipe.kernels.jit import kernel


@kernel
def matmul(a: Floats, b: Floats, out: Floats) -> None:
    """Compute ``out = a @ b``.

    Parameters
    ----------
    a : array, shape [M, K]
        Left operand.
    b : array, shape [K, N]
        Right operand.
    out : array, shape [M, N]
        Overwritten.
    """
    np.dot(a, b, out)


@kernel
def matmul_nt(a: Floats, b: Floats, out: Floats) -> None:
    """Compute ``out = a @ b.T``, as the backward of a product does for its input.

    Parameters
    ----------
    a : array, shape [M, K]
        Left operand.
    b : array, shape [N, K]
        Right operand, before it is transposed.
    out : array, shape [M, N]
        Overwritten.
    """
    np.dot(a, b.T, out)


@kernel
def matmul_tn(a: Floats, b: Floats, out: Floats) -> None:
    """Compute ``out = a.T @ b``, as the backward of a product does for its weight.

    Parameters
    ----------
    a : array, shape [R, K]
        Left operand, before it is transposed.
    b : array, shape [R, N]
        Right operand.
    out : array, shape [K, N]
        Overwritten.
    """
    np.dot(a.T, b, out)


@kernel
def matmul_bias(a: Floats, w: Floats, bias: Floats, out: Floats) -> None:
    """Compute ``out = a @ w + bias``.

    Parameters
    ----------
    a : array, shape [M, K]
        Input.
    w : array, shape [K, N]
        Weight.
    bias : array, shape [N]
        Added to every row.
    out : array, shape [M, N]
        Overwritten.
    """
    np.dot(a, w, out)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] += bias[column]
