"""Every kernel that training calls, with tiny arguments of the types that it calls them with."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcpipe.kernels import activation, adamw, attention, digest, embedding, gemm, loss, norm, reduce

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def cases(precision: str = "f32") -> list[Case]:
    """List every kernel with tiny arguments of the types that training calls it with.

    Parameters
    ----------
    precision : str
        ``f32`` or ``bf16``. Only the kernels of that precision are loaded.

    Returns
    -------
    list of (kernel, arguments)
        In the order of a training step. Each call gets buffers of its own.
    """
    if precision == "bf16":
        from hpcpipe.kernels.cases_bf16 import bfloat16_cases

        return [*bfloat16_cases(), *_shared_cases()]
    return [*_float32_cases(), *_shared_cases()]


def floats(*shape: int) -> Any:
    """Return zeros in float32."""
    return np.zeros(shape, np.float32)


def _shared_cases() -> list[Case]:
    """Return the kernels of either precision."""
    tokens, x, vector, square = np.zeros((1, 2), np.int32), (2, 2), 2, (2, 2)
    return [
        (embedding.embedding_forward, (tokens, floats(3, 2), floats(*x), floats(*x))),
        (embedding.embedding_backward_weight, (tokens, floats(*x), floats(3, 2), floats(*x))),
        # Of bfloat16 too, since plain matrices tell what the machine can do.
        (gemm.matmul, (floats(*x), floats(*square), floats(*x))),
        (reduce.add_into, (floats(vector), floats(vector))),
        (reduce.sum_of_squares, (floats(vector),)),
        (reduce.block_sums_of_squares, (floats(vector), np.zeros(1))),
        (digest.digest_blocks, (np.zeros(vector, np.uint32), 0, 1)),
        (
            adamw.adamw_update,
            (*(floats(vector) for _ in range(4)), 1.0, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05),
        ),
    ]


def _float32_cases() -> list[Case]:
    """Return the kernels of float32 layers."""
    batch, context, heads, width, vocab = 1, 2, 1, 2, 3
    rows = batch * context

    tokens = np.zeros((batch, context), np.int32)
    targets = tokens.reshape(rows)
    x, vector, column, logits, qkv = (rows, width), width, rows, (rows, vocab), (rows, 3 * width)
    square, lse = (width, width), (batch, heads, context)
    scratch = attention.attention_scratch(context, width, heads)
    return [
        (
            norm.layernorm_forward,
            (floats(*x), floats(vector), floats(vector), floats(*x), floats(column), floats(column)),
        ),
        (gemm.matmul_bias, (floats(*x), floats(*square), floats(vector), floats(*x))),
        (
            attention.attention_forward,
            (floats(*qkv), batch, heads, floats(*x), floats(*lse), floats(scratch)),
        ),
        (activation.gelu_forward, (floats(*x), floats(*x))),
        (gemm.matmul_nt, (floats(*x), floats(*square), floats(*x))),
        (loss.cross_entropy_forward, (floats(*logits), targets, floats(column), floats(column))),
        (
            loss.cross_entropy_backward,
            (floats(*logits), targets, floats(column), floats(column), floats(*logits)),
        ),
        (gemm.matmul_tn, (floats(*x), floats(*x), floats(*square))),
        (reduce.bias_gradient, (floats(*x), floats(vector), floats(vector))),
        (activation.gelu_backward, (floats(*x), floats(*x), floats(*x))),
        (
            attention.attention_backward,
            (
                *(floats(*x), floats(*qkv), floats(*x), floats(*lse)),
                *(batch, heads, floats(*qkv), floats(scratch)),
            ),
        ),
        (
            norm.layernorm_backward_input,
            (floats(*x), floats(*x), floats(vector), floats(column), floats(column), floats(*x)),
        ),
        (
            norm.layernorm_backward_weight,
            (
                *(floats(*x), floats(*x), floats(column), floats(column)),
                *(floats(vector), floats(vector), floats(2, vector)),
            ),
        ),
    ]
