"""The kernels of float32 layers, as ``hpcpipe bench gemm`` times them. They compute on one thread."""

from functools import partial

import numpy as np

from hpcpipe.bench.cases import (
    ATTENTION,
    FORWARD,
    INPUT,
    MEMORY,
    PRODUCTS,
    WEIGHT,
    Case,
    Run,
    Shape,
    random_arrays,
    random_ids,
)
from hpcpipe.kernels.activation import gelu_backward, gelu_forward
from hpcpipe.kernels.attention import attention_backward, attention_forward, attention_scratch
from hpcpipe.kernels.gemm import matmul, matmul_bias, matmul_nt
from hpcpipe.kernels.loss import cross_entropy_backward, cross_entropy_forward
from hpcpipe.kernels.norm import layernorm_backward_input, layernorm_backward_weight, layernorm_forward
from hpcpipe.kernels.reduce import add_into, bias_gradient
from hpcpipe.model.linear import add_matrix_gradient
from hpcpipe.model.tensors import f32


def float32_cases(shape: Shape) -> list[Case]:
    """Return all but the update and the embedding, in the order of the report."""
    rows, width, vocab = shape.rows, shape.model.width, shape.model.vocab
    cases = []
    for name, (inputs, outputs) in shape.matrices().items():
        bias = "" if name == "head" else "bias"
        cases += [
            Case(PRODUCTS, name, FORWARD, (rows, inputs, outputs), partial(_forward, shape, name), end=bias),
            Case(PRODUCTS, name, INPUT, (rows, outputs, inputs), partial(_input, shape, name)),
            Case(PRODUCTS, name, WEIGHT, (inputs, rows, outputs), partial(_weight, shape, name), end="added"),
        ]
    return [
        *cases,
        Case(ATTENTION, "attention", FORWARD, (rows, width), partial(_attention, shape, True)),
        Case(ATTENTION, "attention", INPUT, (rows, width), partial(_attention, shape, False)),
        Case(MEMORY, "LayerNorm", FORWARD, (rows, width), partial(_norm, shape, FORWARD)),
        Case(MEMORY, "LayerNorm", INPUT, (rows, width), partial(_norm, shape, INPUT)),
        Case(MEMORY, "LayerNorm", WEIGHT, (rows, width), partial(_norm, shape, WEIGHT)),
        Case(MEMORY, "bias", WEIGHT, (rows, 4 * width), partial(_bias, shape)),
        Case(MEMORY, "residual", FORWARD, (rows, width), partial(_residual, shape)),
        Case(MEMORY, "GELU", FORWARD, (rows, 4 * width), partial(_gelu, shape, True)),
        Case(MEMORY, "GELU", INPUT, (rows, 4 * width), partial(_gelu, shape, False)),
        Case(MEMORY, "cross-entropy", FORWARD, (rows, vocab), partial(_cross_entropy, shape, True)),
        Case(MEMORY, "cross-entropy", INPUT, (rows, vocab), partial(_cross_entropy, shape, False)),
    ]


def _forward(shape: Shape, name: str) -> Run:
    rows, (inputs, outputs) = shape.rows, shape.matrices()[name]
    if name == "head":
        table = {"x": f32(rows, inputs), "table": f32(outputs, inputs), "logits": f32(rows, outputs)}
        arguments = tuple(random_arrays(table).values())
        return lambda team: matmul_nt(*arguments)
    specs = {"x": f32(rows, inputs), "weight": f32(inputs, outputs), "b": f32(outputs), "out": f32(rows, outputs)}
    arrays = tuple(random_arrays(specs).values())
    return lambda team: matmul_bias(*arrays)


def _input(shape: Shape, name: str) -> Run:
    rows, (inputs, outputs) = shape.rows, shape.matrices()[name]
    weight = f32(outputs, inputs) if name == "head" else f32(inputs, outputs)
    arrays = tuple(random_arrays({"d": f32(rows, outputs), "weight": weight, "out": f32(rows, inputs)}).values())
    kernel = matmul if name == "head" else matmul_nt
    return lambda team: kernel(*arrays)


def _weight(shape: Shape, name: str) -> Run:
    rows, (inputs, outputs) = shape.rows, shape.matrices()[name]
    if name == "head":
        inputs, outputs = outputs, inputs
    specs = {"x": f32(rows, inputs), "d": f32(rows, outputs), "gradient": f32(inputs, outputs)}
    x, d, gradient = random_arrays(specs).values()
    scratch = random_arrays({"matrix": f32(inputs * outputs)})
    return lambda team: add_matrix_gradient(x, d, gradient, scratch)


def _attention(shape: Shape, is_forward: bool) -> Run:
    rows, model, batch, context = shape.rows, shape.model, shape.batch, shape.context
    width, heads = model.width, model.heads
    s = random_arrays(
        {
            "qkv": f32(rows, 3 * width),
            "out": f32(rows, width),
            "lse": f32(batch, heads, context),
            "dout": f32(rows, width),
            "dqkv": f32(rows, 3 * width),
            "scratch": f32(attention_scratch(context, width, heads)),
        }
    )
    forward = (s["qkv"], batch, heads, s["out"], s["lse"], s["scratch"])
    if is_forward:
        return lambda team: attention_forward(*forward)
    attention_forward(*forward)
    backward = (s["dout"], s["qkv"], s["out"], s["lse"], batch, heads, s["dqkv"], s["scratch"])
    return lambda team: attention_backward(*backward)


def _norm(shape: Shape, use: str) -> Run:
    rows, width = shape.rows, shape.model.width
    s = random_arrays(
        {
            "x": f32(rows, width),
            "weight": f32(width),
            "bias": f32(width),
            "out": f32(rows, width),
            "mean": f32(rows),
            "rstd": f32(rows),
            "dx": f32(rows, width),
            "scratch": f32(2, width),
        }
    )
    forward = (s["x"], s["weight"], s["bias"], s["out"], s["mean"], s["rstd"])
    if use == FORWARD:
        return lambda team: layernorm_forward(*forward)
    if use == INPUT:
        layernorm_forward(*forward)
        backward = (s["out"], s["x"], s["weight"], s["mean"], s["rstd"], s["dx"])
        return lambda team: layernorm_backward_input(*backward)
    gradients = (s["out"], s["x"], s["mean"], s["rstd"], s["weight"], s["bias"], s["scratch"])
    return lambda team: layernorm_backward_weight(*gradients)


def _bias(shape: Shape) -> Run:
    rows, columns = shape.rows, 4 * shape.model.width
    arrays = tuple(random_arrays({"d": f32(rows, columns), "sum": f32(columns), "scratch": f32(columns)}).values())
    return lambda team: bias_gradient(*arrays)


def _residual(shape: Shape) -> Run:
    size = shape.rows * shape.model.width
    arrays = tuple(random_arrays({"stream": f32(size), "added": f32(size)}).values())
    return lambda team: add_into(*arrays)


def _gelu(shape: Shape, is_forward: bool) -> Run:
    size = (shape.rows, 4 * shape.model.width)
    x, d, out = random_arrays({"x": f32(*size), "d": f32(*size), "out": f32(*size)}).values()
    if is_forward:
        return lambda team: gelu_forward(x, out)
    # Not in place: the gradient would vanish in some calls, and subnormal numbers are slow.
    return lambda team: gelu_backward(d, x, out)


def _cross_entropy(shape: Shape, is_forward: bool) -> Run:
    rows, vocab = shape.rows, shape.model.vocab
    s = random_arrays(
        {"logits": f32(rows, vocab), "coefficients": f32(rows), "lse": f32(rows), "gradient": f32(rows, vocab)}
    )
    targets = random_ids((rows,), vocab)
    s["lse"][:] = np.log(vocab) + 0.5
    if is_forward:
        return lambda team: _ignore(cross_entropy_forward(s["logits"], targets, s["coefficients"], s["lse"]))
    backward = (s["logits"], targets, s["coefficients"], s["lse"], s["gradient"])
    return lambda team: cross_entropy_backward(*backward)


def _ignore(loss: float) -> None:
    """Drop what a kernel returns."""
