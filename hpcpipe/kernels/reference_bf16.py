"""Plain-numpy twins of norms, sums, head and attention on bfloat16; in float64, and rounded to bfloat16 once."""

import numpy as np

from hpcpipe.kernels import reference
from hpcpipe.kernels.arrays import BFloats, Floats, Panels, Tokens
from hpcpipe.kernels.reference_products import pack_columns, pack_rows, rounded, unpacked, widened

# Shapes and meaning are in the modules of the kernels.
# ruff: noqa: D103


def layernorm_forward_bf16(
    x: Floats, weight: Floats, bias: Floats, out: BFloats, mean: Floats, rstd: Floats, first: int, last: int
) -> None:
    rows, exact = slice(first, last), np.empty((last - first, x.shape[1]))
    reference.layernorm_forward(x[rows].astype(np.float64), weight, bias, exact, mean[rows], rstd[rows])
    out[rows] = rounded(exact)


def layernorm_backward_input_bf16(
    dout: BFloats,
    x: Floats,
    weight: Floats,
    mean: Floats,
    rstd: Floats,
    dx: Floats,
    dx_bf16: BFloats,
    first: int,
    last: int,
) -> None:
    rows = slice(first, last)
    exact = dx[rows].astype(np.float64)
    reference.layernorm_backward_input(widened(dout[rows]), x[rows], weight, mean[rows], rstd[rows], exact)
    dx[rows] = exact
    dx_bf16[rows] = rounded(dx[rows])


def layernorm_backward_weight_bf16(
    dout: BFloats,
    x: Floats,
    mean: Floats,
    rstd: Floats,
    dweight: Floats,
    dbias: Floats,
    first_column: int,
    last_column: int,
) -> None:
    columns = slice(first_column, last_column)
    normal = (x.astype(np.float64) - mean[:, None]) * rstd[:, None]
    dweight[columns] += (widened(dout) * normal).sum(axis=0)[columns]
    bias_gradient_bf16(dout, dbias, first_column, last_column)


def bias_gradient_bf16(d: BFloats, acc: Floats, first_column: int, last_column: int) -> None:
    columns = slice(first_column, last_column)
    acc[columns] += widened(d).sum(axis=0)[columns]


def head_logits(
    a: BFloats,
    table: Panels,
    vocab: int,
    logits: BFloats,
    highest: Floats,
    total: Floats,
    first: int,
    last: int,
) -> None:
    rows = slice(first, last)
    logits[rows, :vocab] = rounded(widened(a[rows]) @ widened(unpacked(table, a.shape[1], vocab)))
    logits[rows, vocab : -(-vocab // 32) * 32] = 0
    values = widened(logits[rows, :vocab])
    highest[rows] = values.max(axis=1)
    total[rows] = 0
    total[rows, 0] = np.exp(values - highest[rows, None]).sum(axis=1)


def cross_entropy_forward_bf16(
    logits: BFloats, targets: Tokens, coefficients: Floats, highest: Floats, total: Floats, lse: Floats
) -> float:
    exact = highest + np.log(total.astype(np.float64).sum(axis=1))
    lse[:] = exact
    counted = np.flatnonzero(coefficients)
    losses = exact[counted] - widened(logits)[counted, targets[counted]]
    return float(np.sum(coefficients[counted] * losses))


def cross_entropy_backward_bf16(
    logits: BFloats,
    vocab: int,
    targets: Tokens,
    coefficients: Floats,
    lse: Floats,
    gradient: BFloats,
    first: int,
    last: int,
) -> None:
    rows = slice(first, last)
    values, exact = widened(logits[rows, :vocab]), np.empty((last - first, vocab))
    weights = coefficients[rows].astype(np.float64)
    reference.cross_entropy_backward(values, targets[rows], weights, lse[rows].astype(np.float64), exact)
    gradient[rows, : -(-vocab // 32) * 32] = 0
    gradient[rows, :vocab] = rounded(exact)


def _copy_heads(source: BFloats, target: BFloats, shape: tuple[int, ...], first: int, last: int) -> None:
    """Copy pairs (sample, head) of arrays whose shape is [batch, T, 1 or 3, heads, D]."""
    for pair in range(first, last):
        sample, head = divmod(pair, shape[3])
        target.reshape(shape)[sample, :, :, head] = source.reshape(shape)[sample, :, :, head]


def attention_forward_bf16(
    qkv: BFloats, batch: int, heads: int, out: BFloats, lse: Floats, scratch: BFloats, first: int, last: int
) -> None:
    exact, exact_lse = np.empty(out.shape), np.empty(lse.shape)
    reference.attention_forward(widened(qkv), batch, heads, exact, exact_lse, np.empty(0))
    _copy_heads(rounded(exact), out, (*lse.shape[::2], 1, heads, out.shape[1] // heads), first, last)
    lse.reshape(batch * heads, -1)[first:last] = exact_lse.reshape(batch * heads, -1)[first:last]


def attention_backward_bf16(
    dout: BFloats,
    qkv: BFloats,
    out: BFloats,
    lse: Floats,
    batch: int,
    heads: int,
    dqkv: BFloats,
    scratch: BFloats,
    first: int,
    last: int,
) -> None:
    exact = np.empty(qkv.shape)
    reference.attention_backward(
        widened(dout), widened(qkv), widened(out), lse.astype(np.float64), batch, heads, exact, np.empty(0)
    )
    _copy_heads(rounded(exact), dqkv, (*lse.shape[::2], 3, heads, out.shape[1] // heads), first, last)


def adamw_pack(
    weight: Floats,
    grad: Floats,
    moment1: Floats,
    moment2: Floats,
    scale: float,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    correction1: float,
    correction2: float,
    rows: Panels,
    columns: Panels,
    first_row: int,
    last_row: int,
) -> None:
    some, decay = slice(first_row, last_row), (beta1, beta2, epsilon, weight_decay, correction1, correction2)
    arrays = (weight[some], grad[some], moment1[some], moment2[some])
    reference.adamw_update(*arrays, scale, learning_rate, *decay)
    pack_rows(weight, rows, first_row, last_row)
    pack_columns(weight, columns, first_row, last_row)
