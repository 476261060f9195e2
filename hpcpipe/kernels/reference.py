"""The plain numpy twin of every kernel: the same names, signatures and effects, written to be read."""

import math

import numpy as np

from hpcpipe.kernels import digest
from hpcpipe.kernels.arrays import Floats, Tokens
from hpcpipe.kernels.reduce import BLOCK

# Shapes and meaning are in the modules of the kernels.
# ruff: noqa: D103


def matmul(a: Floats, b: Floats, out: Floats) -> None:
    out[:] = a @ b


def matmul_nt(a: Floats, b: Floats, out: Floats) -> None:
    out[:] = a @ b.T


def matmul_tn(a: Floats, b: Floats, out: Floats) -> None:
    out[:] = a.T @ b


def matmul_bias(a: Floats, w: Floats, bias: Floats, out: Floats) -> None:
    out[:] = a @ w + bias


def add_into(acc: Floats, x: Floats) -> None:
    acc += x


def sum_of_squares(x: Floats) -> float:
    return float(np.sum(x.astype(np.float64) ** 2))


def block_sums_of_squares(x: Floats, out: Floats) -> None:
    for block in range(len(out)):
        out[block] = sum_of_squares(x[block * BLOCK : (block + 1) * BLOCK])


def bias_gradient(dy: Floats, acc: Floats, scratch: Floats) -> None:
    acc += dy.sum(axis=0)


def layernorm_forward(x: Floats, weight: Floats, bias: Floats, out: Floats, mean: Floats, rstd: Floats) -> None:
    mean[:] = x.mean(axis=1)
    rstd[:] = 1 / np.sqrt(x.var(axis=1) + 1e-5)
    out[:] = (x - mean[:, None]) * rstd[:, None] * weight + bias


def layernorm_backward_input(dout: Floats, x: Floats, weight: Floats, mean: Floats, rstd: Floats, dx: Floats) -> None:
    normal = (x - mean[:, None]) * rstd[:, None]
    g = dout * weight
    average = g.mean(axis=1, keepdims=True)
    average_normal = (g * normal).mean(axis=1, keepdims=True)
    dx += rstd[:, None] * (g - average - normal * average_normal)


def layernorm_backward_weight(
    dout: Floats,
    x: Floats,
    mean: Floats,
    rstd: Floats,
    dweight: Floats,
    dbias: Floats,
    scratch: Floats,
) -> None:
    normal = (x - mean[:, None]) * rstd[:, None]
    dweight += (dout * normal).sum(axis=0)
    dbias += dout.sum(axis=0)


def gelu_forward(x: Floats, out: Floats) -> None:
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    out[:] = 0.5 * x * (1 + np.tanh(u))


def gelu_backward(dout: Floats, x: Floats, dx: Floats) -> None:
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    tanh = np.tanh(u)
    dx[:] = dout * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope)


def _split_heads(x: Floats, batch: int, heads: int) -> Floats:
    """Turn [R, C] into [batch, heads, T, D]."""
    rows, width = x.shape
    return x.reshape(batch, rows // batch, heads, width // heads).transpose(0, 2, 1, 3)


def _join_heads(x: Floats) -> Floats:
    """Turn [batch, heads, T, D] into [R, C]."""
    batch, heads, context, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch * context, heads * size)


def _masked_scores(q: Floats, k: Floats) -> Floats:
    """Compute the scores of [batch, heads, T, T], minus infinity where a key lies after its query."""
    context, size = q.shape[-2:]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(size)
    scores[..., np.triu(np.ones((context, context), dtype=bool), k=1)] = -np.inf
    return scores


def attention_scratch(context: int, width: int, heads: int) -> int:
    return 0


def attention_forward(qkv: Floats, batch: int, heads: int, out: Floats, lse: Floats, scratch: Floats) -> None:
    q, k, v = (_split_heads(x, batch, heads) for x in np.split(qkv, 3, axis=1))
    scores = _masked_scores(q, k)
    highest = scores.max(axis=-1)
    lse[:] = highest + np.log(np.exp(scores - highest[..., None]).sum(axis=-1))
    out[:] = _join_heads(np.exp(scores - lse[..., None]) @ v)


def attention_backward(
    dout: Floats,
    qkv: Floats,
    out: Floats,
    lse: Floats,
    batch: int,
    heads: int,
    dqkv: Floats,
    scratch: Floats,
) -> None:
    q, k, v = (_split_heads(x, batch, heads) for x in np.split(qkv, 3, axis=1))
    do = _split_heads(dout, batch, heads)
    p = np.exp(_masked_scores(q, k) - lse[..., None])
    dp = do @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    gradients = (ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ do)
    dqkv[:] = np.concatenate([_join_heads(x) for x in gradients], axis=1)


def embedding_forward(tokens: Tokens, token_weight: Floats, position_weight: Floats, out: Floats) -> None:
    context = tokens.shape[1]
    out[:] = (token_weight[tokens] + position_weight[:context]).reshape(out.shape)


def embedding_backward_weight(tokens: Tokens, dout: Floats, d_token: Floats, d_position: Floats) -> None:
    batch, context = tokens.shape
    np.add.at(d_token, tokens.ravel(), dout)
    d_position[:context] += dout.reshape(batch, context, -1).sum(axis=0)


def cross_entropy_forward(logits: Floats, targets: Tokens, coefficients: Floats, lse: Floats) -> float:
    highest = logits.max(axis=1)
    lse[:] = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    counted = np.flatnonzero(coefficients)
    losses = lse[counted].astype(np.float64) - logits[counted, targets[counted]]
    return float(np.sum(coefficients[counted] * losses))


def cross_entropy_backward(logits: Floats, targets: Tokens, coefficients: Floats, lse: Floats, dlogits: Floats) -> None:
    counted = np.flatnonzero(coefficients)
    dlogits[:] = np.exp(logits - lse[:, None])
    dlogits[counted, targets[counted]] -= 1
    dlogits[counted] *= coefficients[counted, None]
    dlogits[coefficients == 0] = 0


def adamw_update(
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
) -> None:
    g = scale * grad
    moment1[:] = beta1 * moment1 + (1 - beta1) * g
    moment2[:] = beta2 * moment2 + (1 - beta2) * g * g
    weight -= learning_rate * weight_decay * weight
    weight -= learning_rate * (moment1 / correction1) / (np.sqrt(moment2 / correction2) + epsilon)


def digest_blocks(words: np.ndarray, first: int, last: int) -> int:
    total = 0
    for block in range(first, last):
        content = words[block * digest.BLOCK : (block + 1) * digest.BLOCK].tolist()
        low, high = sum(content[0::2]), sum(content[1::2])
        total += (2 * block + 1) * (low + (high << 32))
    return total & (1 << 64) - 1
