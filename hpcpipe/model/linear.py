"""The weight half of a linear layer's backward, which every layer with matrices shares."""

import numpy as np

from hpcpipe.kernels.gemm import matmul_tn
from hpcpipe.kernels.reduce import add_into, bias_gradient
from hpcpipe.model.layer import Arrays


def add_matrix_gradient(x: np.ndarray, d: np.ndarray, gradient: np.ndarray, scratch: Arrays) -> None:
    """Add ``x.T @ d`` to the gradient of a weight matrix.

    The product of one microbatch is finished before it is added, so the sum over microbatches has one order however
    the product itself is computed.

    Parameters
    ----------
    x : ndarray, shape (rows, inputs)
        Input of the layer.
    d : ndarray, shape (rows, outputs)
        Gradient of its output.
    gradient : ndarray, shape (inputs, outputs)
        Added to.
    scratch : mapping of ndarray
        ``matrix``: at least as many elements as the gradient.
    """
    product = scratch["matrix"][: gradient.size].reshape(gradient.shape)
    matmul_tn(x, d, product)
    add_into(gradient.reshape(-1), product.reshape(-1))


def add_linear_gradients(x: np.ndarray, d: np.ndarray, gradients: Arrays, name: str, scratch: Arrays) -> None:
    """Add the gradients of ``<name>/weight`` and ``<name>/bias``; shapes as in `add_matrix_gradient`."""
    add_matrix_gradient(x, d, gradients[f"{name}/weight"], scratch)
    bias = gradients[f"{name}/bias"]
    bias_gradient(d, bias, scratch["bias"][: bias.size])
