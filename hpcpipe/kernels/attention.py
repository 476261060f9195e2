"""Causal multi-head self-attention over packed queries, keys and values.

Shapes: R rows (batch x T), T context, C width, D = C / heads. A row of ``qkv`` is ``q | k | v``, each of C columns, of
which head h has columns h * D to (h + 1) * D. Queries are taken in blocks, and a block meets only the keys that it may
see. The forward stores one number per query, the logarithm of the sum of its exponentials, from which the backward
computes the probabilities again, as Dao et al. do (FlashAttention, arXiv 2205.14135).
"""

import math
from typing import Any

import numpy as np

from hpcpipe.kernels.arrays import Floats
from hpcpipe.kernels.exponential import exp
from hpcpipe.kernels.jit import kernel

_BLOCK = 64  # queries taken at a time


def attention_scratch(context: int, width: int, heads: int) -> int:
    """Return the number of elements of working space that forward and backward need.

    Parameters
    ----------
    context, width, heads : int
        T, C, and the number of heads.

    Returns
    -------
    int
        Elements of a 1-D array of the type of the activations, whatever the batch.
    """
    size = width // heads
    block = min(_BLOCK, context)
    return 7 * context * size + block * size + 2 * block * context


@kernel
def _gather(source: Floats, first_row: int, first_column: int, target: Floats) -> None:
    """Copy the columns of one head of one sample into a contiguous matrix."""
    for row in range(target.shape[0]):
        line = source[first_row + row, first_column : first_column + target.shape[1]]
        for c in range(target.shape[1]):
            target[row, c] = line[c]


@kernel
def _scatter(source: Floats, target: Floats, first_row: int, first_column: int) -> None:
    """Copy a contiguous matrix to the columns of one head of one sample."""
    for row in range(source.shape[0]):
        line = target[first_row + row, first_column : first_column + source.shape[1]]
        for c in range(source.shape[1]):
            line[c] = source[row, c]


@kernel
def _sum(row: Floats, count: int) -> Any:
    """Sum the first elements of a row in eight interleaved parts: an order that leaves the compiler no choice."""
    scalar = row.dtype.type
    a = b = c = d = e = f = g = h = scalar(0)
    whole = count - count % 8
    for j in range(0, whole, 8):
        a += row[j]
        b += row[j + 1]
        c += row[j + 2]
        d += row[j + 3]
        e += row[j + 4]
        f += row[j + 5]
        g += row[j + 6]
        h += row[j + 7]
    total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for j in range(whole, count):
        total += row[j]
    return total


@kernel
def _softmax_rows(scores: Floats, first: int, scale: float, row_lse: Floats) -> None:
    """Turn scores into probabilities in place; row i sees the keys 0 to first + i."""
    scalar = scores.dtype.type
    factor = scalar(scale)
    for i in range(scores.shape[0]):
        visible = first + i + 1
        highest = scores[i, 0]
        for j in range(1, visible):
            if scores[i, j] > highest:
                highest = scores[i, j]
        for j in range(visible):
            scores[i, j] = exp((scores[i, j] - highest) * factor)
        total = _sum(scores[i], visible)
        inverse = scalar(1) / total
        for j in range(visible):
            scores[i, j] *= inverse
        for j in range(visible, scores.shape[1]):
            scores[i, j] = 0
        row_lse[i] = highest * factor + np.log(total)


@kernel
def attention_forward(qkv: Floats, batch: int, heads: int, out: Floats, lse: Floats, scratch: Floats) -> None:
    """Compute ``out = softmax(q @ k.T / sqrt(D)) @ v`` for every head of every sample, each query up to its own key.

    Parameters
    ----------
    qkv : array, shape [R, 3 * C]
        Queries, keys and values.
    batch, heads : int
        Number of samples in the rows, and of heads in the columns.
    out : array, shape [R, C]
        Overwritten.
    lse : array, shape [batch, heads, T]
        Overwritten with the logarithm of the sum of the exponentials of each query, which the backward takes.
    scratch : array, shape [attention_scratch(T, C, heads)]
        Working space; its contents are lost.
    """
    context = qkv.shape[0] // batch
    width = qkv.shape[1] // 3
    size = width // heads
    head = context * size
    q = scratch[:head].reshape(context, size)
    k = scratch[head : 2 * head].reshape(context, size)
    v = scratch[2 * head : 3 * head].reshape(context, size)
    o = scratch[3 * head : 4 * head].reshape(context, size)
    rest = scratch[4 * head :]
    scale = 1.0 / math.sqrt(size)
    for sample in range(batch):
        row = sample * context
        for h in range(heads):
            column = h * size
            _gather(qkv, row, column, q)
            _gather(qkv, row, width + column, k)
            _gather(qkv, row, 2 * width + column, v)
            for first in range(0, context, _BLOCK):
                last = min(first + _BLOCK, context)
                scores = rest[: (last - first) * last].reshape(last - first, last)
                np.dot(q[first:last], k[:last].T, scores)
                _softmax_rows(scores, first, scale, lse[sample, h, first:last])
                np.dot(scores, v[:last], o[first:last])
            _scatter(o, out, row, column)


@kernel
def _score_gradient(
    scores: Floats, dscores: Floats, first: int, scale: float, row_lse: Floats, do: Floats, o: Floats
) -> None:
    """Turn scores into probabilities and gradients of probabilities into gradients of scores, both in place."""
    scalar = scores.dtype.type
    factor = scalar(scale)
    for i in range(scores.shape[0]):
        visible = first + i + 1
        projection = scalar(0)
        for c in range(do.shape[1]):
            projection += do[i, c] * o[i, c]
        log_total = row_lse[i]
        for j in range(visible):
            probability = exp(scores[i, j] * factor - log_total)
            scores[i, j] = probability
            dscores[i, j] = probability * (dscores[i, j] - projection) * factor
        for j in range(visible, scores.shape[1]):
            scores[i, j] = 0
            dscores[i, j] = 0


@kernel
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
    """Compute the gradient of queries, keys and values.

    Parameters
    ----------
    dout : array, shape [R, C]
        Gradient of the output.
    qkv : array, shape [R, 3 * C]
        Input of the forward.
    out, lse : array, shapes [R, C] and [batch, heads, T]
        What the forward wrote.
    batch, heads : int
        Number of samples in the rows, and of heads in the columns.
    dqkv : array, shape [R, 3 * C]
        Overwritten.
    scratch : array, shape [attention_scratch(T, C, heads)]
        Working space; its contents are lost.
    """
    context = qkv.shape[0] // batch
    width = qkv.shape[1] // 3
    size = width // heads
    head = context * size
    q = scratch[:head].reshape(context, size)
    k = scratch[head : 2 * head].reshape(context, size)
    v = scratch[2 * head : 3 * head].reshape(context, size)
    do = scratch[3 * head : 4 * head].reshape(context, size)
    dk = scratch[4 * head : 5 * head]
    dv = scratch[5 * head : 6 * head]
    part = scratch[6 * head : 7 * head]
    block = min(_BLOCK, context)
    o = scratch[7 * head : 7 * head + block * size].reshape(block, size)
    rest = scratch[7 * head + block * size :]
    scale = 1.0 / math.sqrt(size)
    for sample in range(batch):
        row = sample * context
        for h in range(heads):
            column = h * size
            _gather(qkv, row, column, q)
            _gather(qkv, row, width + column, k)
            _gather(qkv, row, 2 * width + column, v)
            _gather(dout, row, column, do)
            dk[:] = 0
            dv[:] = 0
            for first in range(0, context, _BLOCK):
                last = min(first + _BLOCK, context)
                queries = last - first
                scores = rest[: queries * last].reshape(queries, last)
                dscores = rest[block * context : block * context + queries * last].reshape(queries, last)
                np.dot(q[first:last], k[:last].T, scores)
                np.dot(do[first:last], v[:last].T, dscores)
                _gather(out, row + first, column, o[:queries])
                _score_gradient(scores, dscores, first, scale, lse[sample, h, first:last], do[first:last], o[:queries])
                # The block's outputs are no longer needed: their place takes the gradient of its queries.
                np.dot(dscores, k[:last], o[:queries])
                _scatter(o[:queries], dqkv, row + first, column)
                visible = part[: last * size]
                np.dot(dscores.T, q[first:last], visible.reshape(last, size))
                _add(dk, visible)
                np.dot(scores.T, do[first:last], visible.reshape(last, size))
                _add(dv, visible)
            _scatter(dk.reshape(context, size), dqkv, row, width + column)
            _scatter(dv.reshape(context, size), dqkv, row, 2 * width + column)


@kernel
def _add(total: Floats, part: Floats) -> None:
    """Add a part to the beginning of a total."""
    for i in range(part.shape[0]):
        total[i] += part[i]
