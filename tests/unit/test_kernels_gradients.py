"""Every backward kernel is the derivative of its forward, by central differences in float64."""

import numpy as np
import pytest

from hpcpipe.kernels import activation, attention, embedding, gemm, loss, norm, reduce

STEP = 1e-5


def random_arrays(*shapes):
    random = np.random.default_rng(11)
    return [random.standard_normal(shape) for shape in shapes]


def check(function, x, gradient):
    """Compare the gradient of a function of x (changed in place) with central differences, element by element."""
    estimate = np.empty_like(x)
    for index in np.ndindex(x.shape):
        saved = x[index]
        x[index] = saved + STEP
        above = function()
        x[index] = saved - STEP
        estimate[index] = (above - function()) / (2 * STEP)
        x[index] = saved
    np.testing.assert_allclose(gradient, estimate, rtol=1e-6, atol=1e-8)


def test_matmul_bias():
    x, w, bias, dout = random_arrays((5, 3), (3, 4), 4, (5, 4))
    out = np.empty_like(dout)

    def forward():
        gemm.matmul_bias(x, w, bias, out)
        return np.sum(out * dout)

    dx, dw, dbias = np.empty_like(x), np.empty_like(w), np.zeros_like(bias)
    gemm.matmul_nt(dout, w, dx)
    gemm.matmul_tn(x, dout, dw)
    reduce.bias_gradient(dout, dbias, np.empty(4))
    check(forward, x, dx)
    check(forward, w, dw)
    check(forward, bias, dbias)


def test_layernorm():
    x, weight, bias, dout = random_arrays((5, 7), 7, 7, (5, 7))
    out, mean, rstd = np.empty_like(x), np.empty(5), np.empty(5)

    def forward():
        norm.layernorm_forward(x, weight, bias, out, mean, rstd)
        return np.sum(out * dout)

    forward()
    dx, dweight, dbias = np.zeros_like(x), np.zeros(7), np.zeros(7)
    norm.layernorm_backward_input(dout, x, weight, mean, rstd, dx)
    norm.layernorm_backward_weight(dout, x, mean, rstd, dweight, dbias, np.empty((2, 7)))
    check(forward, x, dx)
    check(forward, weight, dweight)
    check(forward, bias, dbias)


def test_gelu():
    x, dout = random_arrays((5, 7), (5, 7))
    x *= 3
    out, dx = np.empty_like(x), np.empty_like(x)

    def forward():
        activation.gelu_forward(x, out)
        return np.sum(out * dout)

    activation.gelu_backward(dout, x, dx)
    check(forward, x, dx)


@pytest.mark.parametrize("context", [1, 7, 67])
def test_attention(context):
    batch, heads, width = (2, 3, 6) if context < 67 else (1, 1, 2)
    rows = batch * context
    qkv, dout = random_arrays((rows, 3 * width), (rows, width))
    out, lse, dqkv = np.empty((rows, width)), np.empty((batch, heads, context)), np.empty_like(qkv)
    scratch = np.empty(attention.attention_scratch(context, width, heads))

    def forward():
        attention.attention_forward(qkv, batch, heads, out, lse, scratch)
        return np.sum(out * dout)

    forward()
    attention.attention_backward(dout, qkv, out, lse, batch, heads, dqkv, scratch)
    check(forward, qkv, dqkv)


def test_embedding():
    token_weight, position_weight, dout = random_arrays((11, 3), (8, 3), (14, 3))
    tokens = np.random.default_rng(2).integers(0, 11, (2, 7), dtype=np.int32)
    out, d_token, d_position = np.empty_like(dout), np.zeros((11, 3)), np.zeros((8, 3))

    def forward():
        embedding.embedding_forward(tokens, token_weight, position_weight, out)
        return np.sum(out * dout)

    embedding.embedding_backward_weight(tokens, dout, d_token, d_position)
    check(forward, token_weight, d_token)
    check(forward, position_weight, d_position)


def test_cross_entropy():
    (logits,) = random_arrays((5, 11))
    targets, coefficients = np.array([3, -1, 0, 10, 3], np.int32), np.array([0.3, 0, 1.5, 0.2, -0.4])
    lse, dlogits = np.empty(5), np.empty_like(logits)

    def forward():
        return loss.cross_entropy_forward(logits, targets, coefficients, lse)

    forward()
    loss.cross_entropy_backward(logits, targets, coefficients, lse, dlogits)
    check(forward, logits, dlogits)
