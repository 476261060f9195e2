"""The kernels of layers with bfloat16 operands, as ``hpcpipe bench gemm`` times them."""

from collections.abc import Callable
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
    adamw_pack_case,
    random_arrays,
    random_ids,
)
from hpcpipe.kernels.attention_bf16 import attention_backward_bf16, attention_forward_bf16, attention_scratch_bf16
from hpcpipe.kernels.bfloat16 import to_bfloat16
from hpcpipe.kernels.head import cross_entropy_backward_bf16, head_logits
from hpcpipe.kernels.norm_bf16 import (
    layernorm_backward_input_bf16,
    layernorm_backward_weight_bf16,
    layernorm_forward_bf16,
)
from hpcpipe.kernels.panels import panel_elements
from hpcpipe.kernels.products import (
    DEEP_ROWS,
    linear,
    linear_gelu,
    linear_residual,
    product,
    product_deep,
    product_gelu_backward,
)
from hpcpipe.kernels.reduce_bf16 import bias_gradient_bf16
from hpcpipe.kernels.threads import ALONE
from hpcpipe.model.layer import Buffers
from hpcpipe.model.linear_bf16 import add_matrix_gradient, gradient_scratch
from hpcpipe.model.tensors import BufferShapes, bf16, f32

_ENDS = {"qkv": "bias", "output": "residual", "up": "GELU", "down": "residual", "head": "log-sum-exp"}
_LANES = 16


def bfloat16_cases(shape: Shape) -> list[Case]:
    """Return all but the embedding, in the order of the report."""
    rows, width, vocab = shape.rows, shape.model.width, shape.model.vocab
    cases = []
    for name, (inputs, outputs) in shape.matrices().items():
        back = "GELU gradient" if name == "down" else ""
        cases += [
            Case(PRODUCTS, name, FORWARD, (rows, inputs, outputs), partial(_forward, shape, name), end=_ENDS[name]),
            Case(PRODUCTS, name, INPUT, (rows, outputs, inputs), partial(_input, shape, name), end=back),
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
        Case(MEMORY, "rounding", INPUT, (rows, width), partial(_round, shape)),
        Case(MEMORY, "cross-entropy", INPUT, (rows, vocab), partial(_cross_entropy, shape)),
        adamw_pack_case(shape),
    ]


def _forward(shape: Shape, name: str) -> Run:
    rows, (inputs, outputs) = shape.rows, shape.matrices()[name]
    if name == "head":
        return _logits(shape)
    specs: BufferShapes = {"x": bf16(rows, inputs), "panels": bf16(panel_elements(inputs, outputs)), "b": f32(outputs)}
    kernel: Callable[..., None]
    if name == "up":
        kernel = linear_gelu
        specs |= {"hidden": bf16(rows, outputs), "activated": bf16(rows, outputs)}
    elif name == "qkv":
        kernel = linear
        specs |= {"out": bf16(rows, outputs)}
    else:
        kernel = linear_residual
        specs |= {"residual": f32(rows, outputs), "out": f32(rows, outputs)}
    arguments = tuple(random_arrays(specs).values())
    return lambda team: team.run(kernel, rows, *arguments)


def _logits(shape: Shape) -> Run:
    rows, width, vocab = shape.rows, shape.model.width, shape.model.vocab
    operands = random_arrays({"x": bf16(rows, width), "table": bf16(panel_elements(width, vocab))})
    results = random_arrays({"logits": bf16(rows, _padded(vocab)), "highest": f32(rows), "totals": f32(rows, _LANES)})
    return lambda team: team.run(head_logits, rows, *operands.values(), vocab, *results.values())


def _input(shape: Shape, name: str) -> Run:
    rows, (inputs, outputs) = shape.rows, shape.matrices()[name]
    columns = _padded(outputs) if name == "head" else outputs
    specs = {"d": bf16(rows, columns), "panels": bf16(panel_elements(outputs, inputs))}
    operands, out = random_arrays(specs).values(), random_arrays({"out": bf16(rows, inputs)})["out"]
    if name == "head":
        sums = random_arrays({"sums": f32(shape.num_threads, DEEP_ROWS, _padded(inputs))})["sums"]
        return lambda team: team.run(product_deep, rows, *operands, outputs, out, private=sums)
    if name == "down":
        hidden = random_arrays({"hidden": bf16(rows, inputs)})["hidden"]
        return lambda team: team.run(product_gelu_backward, rows, *operands, hidden, out)
    return lambda team: team.run(product, rows, *operands, out)


def _weight(shape: Shape, name: str) -> Run:
    rows, (inputs, outputs) = shape.rows, shape.matrices()[name]
    if name == "head":
        # The table is stored as rows of tokens, and the gradient of the logits is the left operand.
        inputs, outputs = shape.model.vocab, shape.model.width
    columns = _padded(inputs) if name == "head" else inputs
    specs = {"x": bf16(rows, columns), "d": bf16(rows, outputs), "gradient": f32(inputs, outputs)}
    x, d, gradient = random_arrays(specs).values()
    scratch = random_arrays(gradient_scratch(rows, outputs, shape.num_threads))
    return lambda team: add_matrix_gradient(x, d, gradient, Buffers({}, {}, scratch, team))


def _attention(shape: Shape, is_forward: bool) -> Run:
    rows, model, batch, context = shape.rows, shape.model, shape.batch, shape.context
    width, heads = model.width, model.heads
    scratch = -(-attention_scratch_bf16(context, width, heads) // 32) * 32
    s = random_arrays(
        {
            "qkv": bf16(rows, 3 * width),
            "out": bf16(rows, width),
            "lse": f32(batch, heads, context),
            "dout": bf16(rows, width),
            "dqkv": bf16(rows, 3 * width),
            "private": bf16(shape.num_threads, scratch),
        }
    )
    forward = (s["qkv"], batch, heads, s["out"], s["lse"])
    private = s["private"]
    if is_forward:
        return lambda team: team.run(attention_forward_bf16, batch * heads, *forward, private=private, grain=1)
    ALONE.run(attention_forward_bf16, batch * heads, *forward, private=private, grain=1)
    backward = (s["dout"], s["qkv"], s["out"], s["lse"], batch, heads, s["dqkv"])
    return lambda team: team.run(attention_backward_bf16, batch * heads, *backward, private=private, grain=1)


def _norm(shape: Shape, use: str) -> Run:
    rows, width = shape.rows, shape.model.width
    s = random_arrays(
        {
            "x": f32(rows, width),
            "weight": f32(width),
            "bias": f32(width),
            "out": bf16(rows, width),
            "mean": f32(rows),
            "rstd": f32(rows),
            "dx": f32(rows, width),
            "rounded": bf16(rows, width),
        }
    )
    statistics = s["mean"], s["rstd"]
    forward = (s["x"], s["weight"], s["bias"], s["out"], *statistics)
    if use == FORWARD:
        return lambda team: team.run(layernorm_forward_bf16, rows, *forward)
    if use == INPUT:
        ALONE.run(layernorm_forward_bf16, rows, *forward)
        backward = (s["out"], s["x"], s["weight"], *statistics, s["dx"], s["rounded"])
        return lambda team: team.run(layernorm_backward_input_bf16, rows, *backward)
    gradients = (s["out"], s["x"], *statistics, s["weight"], s["bias"])
    return lambda team: team.run(layernorm_backward_weight_bf16, width, *gradients)


def _bias(shape: Shape) -> Run:
    rows, columns = shape.rows, 4 * shape.model.width
    arrays = random_arrays({"d": bf16(rows, columns), "gradient": f32(columns)})
    return lambda team: team.run(bias_gradient_bf16, columns, *arrays.values())


def _round(shape: Shape) -> Run:
    rows, width = shape.rows, shape.model.width
    arrays = random_arrays({"d": f32(rows, width), "out": bf16(rows, width)})
    return lambda team: team.run(to_bfloat16, rows, *arrays.values())


def _cross_entropy(shape: Shape) -> Run:
    rows, vocab = shape.rows, shape.model.vocab
    s = random_arrays(
        {
            "logits": bf16(rows, _padded(vocab)),
            "coefficients": f32(rows),
            "lse": f32(rows),
            "gradient": bf16(rows, _padded(vocab)),
        }
    )
    s["lse"][:] = np.log(vocab) + 0.5
    arguments = (s["logits"], vocab, random_ids((rows,), vocab), s["coefficients"], s["lse"], s["gradient"])
    return lambda team: team.run(cross_entropy_backward_bf16, rows, *arguments)


def _padded(columns: int) -> int:
    return -(-columns // 32) * 32
