"""Every kernel of layers with bfloat16 operands, with tiny arguments of the types that training calls it with."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcpipe.kernels import adamw_bf16, attention_bf16, bfloat16, head, norm_bf16, panels, peak, products, reduce_bf16

_ROWS, _WIDTH, _VOCAB = 32, 32, 32


def bfloat16_cases() -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Return kernels and arguments, in the order of a training step; each call gets buffers of its own."""
    shape, vector, rows, square = (_ROWS, _WIDTH), _WIDTH, (0, _ROWS), (_WIDTH, _WIDTH)
    targets, scratch = np.zeros(_ROWS, np.int32), bits(products.gradient_scratch_rows(_ROWS), _ROWS)
    attention = bits(attention_bf16.attention_scratch_bf16(_ROWS, _WIDTH, 1))
    statistics = (floats(_ROWS), floats(_ROWS))
    lse = floats(1, 1, _ROWS)
    operands = (bits(*shape), panel(*square))
    return [
        (panels.pack_rows, (floats(*square), panel(*square), *rows)),
        (panels.pack_columns, (floats(*square), panel(*square), *rows)),
        (
            norm_bf16.layernorm_forward_bf16,
            (floats(*shape), floats(vector), floats(vector), bits(*shape), *statistics, *rows),
        ),
        (products.linear, (*operands, floats(vector), bits(*shape), *rows)),
        (attention_bf16.attention_forward_bf16, (bits(_ROWS, 3 * _WIDTH), 1, 1, bits(*shape), lse, attention, 0, 1)),
        (products.linear_residual, (*operands, floats(vector), floats(*shape), floats(*shape), *rows)),
        (products.linear_gelu, (*operands, floats(vector), bits(*shape), bits(*shape), *rows)),
        (
            head.head_logits,
            (*operands, _VOCAB, bits(_ROWS, _VOCAB), floats(_ROWS), floats(_ROWS, 16), *rows),
        ),
        (
            head.cross_entropy_forward_bf16,
            (bits(_ROWS, _VOCAB), targets, floats(_ROWS), floats(_ROWS), floats(_ROWS, 16) + 1, floats(_ROWS)),
        ),
        (
            head.cross_entropy_backward_bf16,
            (bits(_ROWS, _VOCAB), _VOCAB, targets, floats(_ROWS), floats(_ROWS), bits(_ROWS, _VOCAB), *rows),
        ),
        (products.product_deep, (*operands, _WIDTH, bits(*shape), _blocks(products.DEEP_ROWS), *rows)),
        (
            norm_bf16.layernorm_backward_input_bf16,
            (bits(*shape), floats(*shape), floats(vector), *statistics, floats(*shape), bits(*shape), *rows),
        ),
        (bfloat16.to_bfloat16, (floats(*shape), bits(*shape), *rows)),
        (bfloat16.from_bfloat16, (bits(1, _VOCAB)[:, : _VOCAB - 1], floats(1, _VOCAB - 1))),
        (products.product_gelu_backward, (*operands, bits(*shape), bits(*shape), *rows)),
        (products.gelu_again, (bits(*shape), bits(*shape), *rows)),
        (products.product, (*operands, bits(*shape), *rows)),
        (
            attention_bf16.attention_backward_bf16,
            (
                *(bits(*shape), bits(_ROWS, 3 * _WIDTH), bits(*shape), lse, 1, 1),
                *(bits(_ROWS, 3 * _WIDTH), attention, 0, 1),
            ),
        ),
        (panels.pack_bfloat16_rows, (bits(*shape), panel(*shape), 0, 1)),
        (products.weight_gradient, (bits(*shape), panel(*shape), floats(*square), scratch, 0, _WIDTH)),
        (reduce_bf16.bias_gradient_bf16, (bits(*shape), floats(vector), 0, _WIDTH)),
        (
            norm_bf16.layernorm_backward_weight_bf16,
            (bits(*shape), floats(*shape), *statistics, floats(vector), floats(vector), 0, _WIDTH),
        ),
        (
            adamw_bf16.adamw_pack,
            (
                *(floats(*square) for _ in range(4)),
                *(1.0, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05),
                *(panel(*square), panel(*square), *rows),
            ),
        ),
        (peak.repeat_block, (*operands, _blocks(32), 1)),
    ]


def floats(*shape: int) -> Any:
    """Return zeros in float32."""
    return np.zeros(shape, np.float32)


def bits(*shape: int) -> Any:
    """Return zeros in bfloat16, from the start of a cache line."""
    return _aligned(int(np.prod(shape)), np.uint16).reshape(shape)


def panel(depth: int, columns: int) -> Any:
    """Return a packed matrix of zeros."""
    return _aligned(panels.panel_elements(depth, columns), np.uint16)


def _blocks(rows: int) -> Any:
    return _aligned(rows * 32, np.float32).reshape(rows, 32)


def _aligned(num_elements: int, dtype: type) -> Any:
    num_bytes = num_elements * np.dtype(dtype).itemsize
    raw = np.zeros(num_bytes + 128, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes].view(dtype)
