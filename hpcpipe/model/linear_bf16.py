"""The weight half of a linear layer's backward with bfloat16 operands, which every layer with matrices shares."""

import numpy as np

from hpcpipe.kernels.panels import pack_bfloat16_rows, panel_elements
from hpcpipe.kernels.products import gradient_scratch_rows, weight_gradient
from hpcpipe.kernels.reduce_bf16 import bias_gradient_bf16
from hpcpipe.model.layer import Arrays, Buffers
from hpcpipe.model.tensors import BufferShapes, bf16


def gradient_scratch(rows: int, outputs: int, num_threads: int) -> BufferShapes:
    """Return the scratch that `add_matrix_gradient` needs.

    Parameters
    ----------
    rows : int
        Rows of the layer's input.
    outputs : int
        The most columns that a gradient of an output has.
    num_threads : int
        Threads of the rank.
    """
    return {
        "packed": bf16(panel_elements(rows, outputs)),
        "transposed": bf16(num_threads, gradient_scratch_rows(rows), -(-rows // 32) * 32),
    }


def add_matrix_gradient(x: np.ndarray, d: np.ndarray, gradient: np.ndarray, buffers: Buffers) -> None:
    """Add ``x.T @ d`` to the gradient of a weight matrix; the product of one microbatch is finished before it is added.

    Parameters
    ----------
    x : ndarray of uint16, shape (rows, inputs)
        Input of the layer, bfloat16.
    d : ndarray of uint16, shape (rows, outputs)
        Gradient of its output, bfloat16.
    gradient : ndarray of float32, shape (inputs, outputs)
        Added to.
    buffers : Buffers
        The layer's, with `gradient_scratch`.
    """
    packed = buffers.scratch["packed"][: panel_elements(*d.shape)]
    buffers.team.run(pack_bfloat16_rows, -(-d.shape[1] // 32), d, packed, grain=1)
    buffers.team.run(weight_gradient, len(gradient), x, packed, gradient, private=buffers.scratch["transposed"])


def add_linear_gradients(x: np.ndarray, d: np.ndarray, gradients: Arrays, name: str, buffers: Buffers) -> None:
    """Add the gradients of ``<name>/weight`` and ``<name>/bias``; shapes as in `add_matrix_gradient`."""
    add_matrix_gradient(x, d, gradients[f"{name}/weight"], buffers)
    buffers.team.run(bias_gradient_bf16, d.shape[1], d, gradients[f"{name}/bias"])
