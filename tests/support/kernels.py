"""Arguments for every kernel, at sizes and with contents that a test chooses."""

import inspect

import numpy as np

from hpcpipe.kernels import activation, adamw, attention, digest, embedding, gemm, loss, norm, reduce, reference

MODULES = (activation, adamw, attention, digest, embedding, gemm, loss, norm, reduce)
KERNELS = {
    name: getattr(module, name)
    for module in MODULES
    for name, value in vars(module).items()
    if hasattr(value, "signatures") and not name.startswith("_")
}
BATCH, HEADS, VOCAB = 3, 3, 11
NAN = float("nan")


def make_arguments(name, dtype, context=7, width=15):
    """Random inputs; what a kernel overwrites and its working space hold NaN, what it adds to holds numbers."""
    random = np.random.default_rng(5)
    rows = BATCH * context

    def floats(*shape):
        return random.standard_normal(shape).astype(dtype)

    def blank(*shape):
        return np.full(shape, NAN, dtype)

    x, dout, vector = floats(rows, width), floats(rows, width), floats(width)
    tokens = random.integers(0, VOCAB, (BATCH, context), dtype=np.int32)
    logits, targets = 4 * floats(rows, VOCAB), random.integers(0, VOCAB, rows, dtype=np.int32)
    coefficients = np.abs(floats(rows))
    coefficients[1::5], targets[1::5] = 0, -1
    mean, rstd, logits_lse = blank(rows), blank(rows), blank(rows)
    reference.layernorm_forward(x, vector, vector, blank(rows, width), mean, rstd)
    reference.cross_entropy_forward(logits, targets, coefficients, logits_lse)
    qkv, out, lse = floats(rows, 3 * width), blank(rows, width), blank(BATCH, HEADS, context)
    reference.attention_forward(qkv, BATCH, HEADS, out, lse, blank(0))
    scratch = blank(attention.attention_scratch(context, width, HEADS))
    n = 4099
    return {
        "matmul": lambda: (x, floats(width, 5), blank(rows, 5)),
        "matmul_nt": lambda: (x, floats(5, width), blank(rows, 5)),
        "matmul_tn": lambda: (x, floats(rows, 5), blank(width, 5)),
        "matmul_bias": lambda: (x, floats(width, 5), floats(5), blank(rows, 5)),
        "add_into": lambda: (floats(n), floats(n)),
        "sum_of_squares": lambda: (floats(n),),
        "block_sums_of_squares": lambda: (floats(n), np.full(5, NAN)),
        "digest_blocks": lambda: (random.integers(0, 1 << 32, n, dtype=np.uint32), 3, 17),
        "bias_gradient": lambda: (dout, vector, blank(width)),
        "layernorm_forward": lambda: (x, vector, floats(width), blank(rows, width), blank(rows), blank(rows)),
        "layernorm_backward_input": lambda: (dout, x, vector, mean, rstd, floats(rows, width)),
        "layernorm_backward_weight": lambda: (dout, x, mean, rstd, vector, floats(width), blank(2, width)),
        "gelu_forward": lambda: (3 * x, blank(rows, width)),
        "gelu_backward": lambda: (dout, 3 * x, blank(rows, width)),
        "attention_forward": lambda: (qkv, BATCH, HEADS, blank(*out.shape), blank(*lse.shape), scratch),
        "attention_backward": lambda: (dout, qkv, out, lse, BATCH, HEADS, blank(*qkv.shape), scratch),
        "embedding_forward": lambda: (tokens, floats(VOCAB, width), floats(context + 2, width), blank(rows, width)),
        "embedding_backward_weight": lambda: (tokens, dout, floats(VOCAB, width), floats(context + 2, width)),
        "cross_entropy_forward": lambda: (logits, targets, coefficients, blank(rows)),
        "cross_entropy_backward": lambda: (logits, targets, coefficients, logits_lse, blank(rows, VOCAB)),
        "adamw_update": lambda: (
            *(floats(n), floats(n), floats(n), np.abs(floats(n))),
            *(0.7, 3e-3, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**3, 1 - 0.95**3),
        ),
    }[name]()


def copies(arguments):
    return [value.copy() if isinstance(value, np.ndarray) else value for value in arguments]


def is_scratch(kernel):
    return [name == "scratch" for name in inspect.signature(kernel).parameters]
