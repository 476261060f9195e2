"""What a call of a kernel has to do at least: operations of products, and bytes that it reads and writes.

Bytes are those of the arguments, each element once for every time that it must come from or go to memory if nothing
is in a cache. Scratch does not count, nor do operations other than those of products, as in model FLOPs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Work(NamedTuple):
    """Operations and traffic.

    Attributes
    ----------
    flops : float
        Floating-point operations of products: 2 for a multiplication and an addition.
    num_bytes : float
        Read and written.
    """

    flops: float
    num_bytes: float

    def plus(self, other: "Work") -> "Work":
        """Return the sum."""
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


NOTHING = Work(0.0, 0.0)


class _Kernel(NamedTuple):
    """How often each argument passes through memory, in their order, and the operations of a call."""

    passes: tuple[int, ...]
    flops: Callable[..., float] = lambda *_: 0.0


def _product(a: Any, b: Any, *rest: Any) -> float:
    """Return the operations of ``a @ b`` for a product whose last array has the shape of the result."""
    out = [array for array in rest if isinstance(array, np.ndarray)][-1]
    return 2.0 * float(out.size) * float(a.shape[1])


def _visible(batch: int, context: int, width: int, num_products: int) -> float:
    """Return the operations of products between queries and the keys up to their own, over all heads."""
    return num_products * 2.0 * batch * width * context * (context + 1) / 2


def _attention_forward(qkv: Any, batch: int, heads: int, out: Any, lse: Any, *_: Any) -> float:
    return _visible(batch, lse.shape[2], out.shape[1], 2)


def _attention_backward(dout: Any, qkv: Any, out: Any, lse: Any, batch: int, *_: Any) -> float:
    return _visible(batch, lse.shape[2], out.shape[1], 5)


def _embedding_forward(tokens: Any, token_weight: Any, position_weight: Any, out: Any, *_: Any) -> Work:
    return Work(0.0, tokens.nbytes + 2 * out.nbytes + _positions(tokens, position_weight))


def _embedding_backward(tokens: Any, dout: Any, d_token: Any, d_position: Any, *_: Any) -> Work:
    return Work(0.0, tokens.nbytes + 3 * dout.nbytes + 2 * _positions(tokens, d_position))


def _positions(tokens: Any, table: Any) -> float:
    return float(tokens.shape[1] * table.shape[1] * table.itemsize)


_ADAMW = _Kernel((2, 1, 2, 2, *[0] * 8))
_ATTENTION_FORWARD = _Kernel((1, 0, 0, 1, 1), _attention_forward)
_ATTENTION_BACKWARD = _Kernel((1, 1, 1, 1, 0, 0, 1), _attention_backward)
_NORM_FORWARD = _Kernel((1, 1, 1, 1, 1, 1))
_NORM_WEIGHT = _Kernel((1, 1, 1, 1, 2, 2))

_KERNELS: dict[str, _Kernel] = {
    "linear": _Kernel((1, 1, 1, 1), _product),
    "linear_gelu": _Kernel((1, 1, 1, 1, 1), _product),
    "linear_residual": _Kernel((1, 1, 1, 1, 1), _product),
    "product": _Kernel((1, 1, 1), _product),
    "product_gelu_backward": _Kernel((1, 1, 1, 1), _product),
    "product_deep": _Kernel((1, 1, 0, 1), lambda a, b, depth, out, *_: 2.0 * out.size * depth),
    "weight_gradient": _Kernel((1, 1, 2), lambda x, d, gradient, *_: 2.0 * len(x) * gradient.size),
    "head_logits": _Kernel((1, 1, 0, 1, 1, 1), lambda a, table, vocab, *_: 2.0 * a.size * vocab),
    "matmul": _Kernel((1, 1, 1), _product),
    "matmul_bias": _Kernel((1, 1, 1, 1), _product),
    "matmul_nt": _Kernel((1, 1, 1), _product),
    "matmul_tn": _Kernel((1, 1, 1), lambda a, b, out: 2.0 * len(a) * out.size),
    "attention_forward": _ATTENTION_FORWARD,
    "attention_forward_bf16": _ATTENTION_FORWARD,
    "attention_backward": _ATTENTION_BACKWARD,
    "attention_backward_bf16": _ATTENTION_BACKWARD,
    "pack_rows": _Kernel((1, 1)),
    "pack_columns": _Kernel((1, 1)),
    "pack_bfloat16_rows": _Kernel((1, 1)),
    "gelu_again": _Kernel((1, 1)),
    "to_bfloat16": _Kernel((1, 1)),
    "from_bfloat16": _Kernel((1, 1)),
    "layernorm_forward": _NORM_FORWARD,
    "layernorm_forward_bf16": _NORM_FORWARD,
    "layernorm_backward_input": _Kernel((1, 1, 1, 1, 1, 2)),
    "layernorm_backward_input_bf16": _Kernel((1, 1, 1, 1, 1, 2, 1)),
    "layernorm_backward_weight": _NORM_WEIGHT,
    "layernorm_backward_weight_bf16": _NORM_WEIGHT,
    "gelu_forward": _Kernel((1, 1)),
    "gelu_backward": _Kernel((1, 1, 1)),
    "bias_gradient": _Kernel((1, 2)),
    "bias_gradient_bf16": _Kernel((1, 2)),
    "add_into": _Kernel((2, 1)),
    "sum_of_squares": _Kernel((1,)),
    "block_sums_of_squares": _Kernel((1, 1)),
    "digest_blocks": _Kernel((1,)),
    "cross_entropy_forward": _Kernel((1, 1, 1, 1)),
    # Of the logits only those of the targets are read.
    "cross_entropy_forward_bf16": _Kernel((0, 1, 1, 1, 1, 1)),
    "cross_entropy_backward": _Kernel((1, 1, 1, 1, 1)),
    "cross_entropy_backward_bf16": _Kernel((1, 0, 1, 1, 1, 1)),
    "adamw_update": _ADAMW,
    "adamw_pack": _Kernel((*_ADAMW.passes, 1, 1)),
}
# Of a table only the rows of the tokens are touched.
_TABLES: dict[str, Callable[..., Work]] = {
    "embedding_forward": _embedding_forward,
    "embedding_backward_weight": _embedding_backward,
}


def work_of(name: str, arguments: Sequence[Any]) -> Work | None:
    """Return what a call of a kernel has to do, whole arrays taken together.

    Parameters
    ----------
    name : str
        Of the kernel.
    arguments : sequence
        Those of the call; bounds of a part, and scratch, at the end may be missing.

    Returns
    -------
    Work or None
        None for a function that is not known.
    """
    if name in _TABLES:
        return _TABLES[name](*arguments)
    kernel = _KERNELS.get(name)
    if kernel is None:
        return None
    num_bytes = sum(times * argument.nbytes for times, argument in zip(kernel.passes, arguments, strict=False) if times)
    return Work(float(kernel.flops(*arguments)), float(num_bytes))
