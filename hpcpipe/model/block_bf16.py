"""The transformer block with bfloat16 operands: float32 residual stream, float32 sums, everything between in bfloat16.

Buffers are named as in `hpcpipe.model.block`. All of them are bfloat16 but the residual stream (``middle``) and the
statistics of norms and attention.
"""

import numpy as np

from hpcpipe.kernels.attention_bf16 import (
    attention_backward_bf16,
    attention_forward_bf16,
    attention_scratch_bf16,
)
from hpcpipe.kernels.bfloat16 import to_bfloat16
from hpcpipe.kernels.norm_bf16 import (
    layernorm_backward_input_bf16,
    layernorm_backward_weight_bf16,
    layernorm_forward_bf16,
)
from hpcpipe.kernels.products import (
    gelu_again,
    linear,
    linear_gelu,
    linear_residual,
    product,
    product_gelu_backward,
)
from hpcpipe.model.block import Block
from hpcpipe.model.layer import Arrays, Buffers, Microbatch, Poll
from hpcpipe.model.linear_bf16 import add_linear_gradients, gradient_scratch
from hpcpipe.model.tensors import BufferShapes, bf16, f32


class BFloat16Block(Block):
    """Block number `index` of a model, for ``train.precision = "bf16"``.

    Parameters
    ----------
    model : ModelConfig
        Shape of the model.
    index : int
        Position among the blocks, from 0.
    """

    cheap = ("normed1", "normed2", "activated")
    packed = ("attention/qkv/weight", "attention/output/weight", "mlp/up/weight", "mlp/down/weight")

    def stash_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the activations that the backward reads."""
        context, width, heads = self._model.context, self._model.width, self._model.heads
        rows = batch * context
        return {
            "normed1": bf16(rows, width),
            "mean1": f32(rows),
            "rstd1": f32(rows),
            "qkv": bf16(rows, 3 * width),
            "attended": bf16(rows, width),
            "lse": f32(batch, heads, context),
            "middle": f32(rows, width),
            "normed2": bf16(rows, width),
            "mean2": f32(rows),
            "rstd2": f32(rows),
            "hidden": bf16(rows, 4 * width),
            "activated": bf16(rows, 4 * width),
        }

    def upstream_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the gradients that enter each matrix and norm from behind."""
        rows, width = batch * self._model.context, self._model.width
        return {
            "d_out": bf16(rows, width),
            "d_hidden": bf16(rows, 4 * width),
            "d_normed2": bf16(rows, width),
            "d_middle": bf16(rows, width),
            "d_qkv": bf16(rows, 3 * width),
            "d_normed1": bf16(rows, width),
        }

    def scratch_shapes(self, batch: int, num_threads: int = 1) -> BufferShapes:
        """Return the shapes of the scratch of the three calls."""
        model = self._model
        rows = batch * model.context
        attention = attention_scratch_bf16(model.context, model.width, model.heads)
        return {
            # Whole cache lines, so that each thread's part starts one.
            "attention": bf16(num_threads, -(-attention // 32) * 32),
            "d_attended": bf16(rows, model.width),
            **gradient_scratch(rows, 4 * model.width, num_threads),
        }

    def forward(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, out: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Compute attention and perceptron, each added to the residual stream."""
        s, w, run, rows = buffers.stash, weights, buffers.team.run, len(x)
        batch = microbatch.tokens.shape[0]
        norm1, norm2 = (s["normed1"], s["mean1"], s["rstd1"]), (s["normed2"], s["mean2"], s["rstd2"])
        run(layernorm_forward_bf16, rows, x, w["norm1/weight"], w["norm1/bias"], *norm1)
        run(linear, rows, s["normed1"], w["attention/qkv/weight:rows"], w["attention/qkv/bias"], s["qkv"])
        poll()
        heads, private = self._model.heads, buffers.scratch["attention"]
        attention = (s["qkv"], batch, heads, s["attended"], s["lse"])
        run(attention_forward_bf16, batch * heads, *attention, private=private, grain=1)
        poll()
        residual = (s["attended"], w["attention/output/weight:rows"], w["attention/output/bias"], x, s["middle"])
        run(linear_residual, rows, *residual)
        run(layernorm_forward_bf16, rows, s["middle"], w["norm2/weight"], w["norm2/bias"], *norm2)
        poll()
        up = (w["mlp/up/weight:rows"], w["mlp/up/bias"])
        run(linear_gelu, rows, s["normed2"], *up, s["hidden"], s["activated"])
        poll()
        down = (w["mlp/down/weight:rows"], w["mlp/down/bias"])
        run(linear_residual, rows, s["activated"], *down, s["middle"], out)
        poll()

    def backward_input(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, d: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Walk the block from behind; `d` follows the residual stream in place."""
        s, up, w, run, rows = buffers.stash, buffers.upstream, weights, buffers.team.run, len(x)
        d_attended = buffers.scratch["d_attended"]
        norm1, norm2 = (s["mean1"], s["rstd1"]), (s["mean2"], s["rstd2"])
        run(to_bfloat16, rows, d, up["d_out"])
        run(product_gelu_backward, rows, up["d_out"], w["mlp/down/weight:columns"], s["hidden"], up["d_hidden"])
        poll()
        run(product, rows, up["d_hidden"], w["mlp/up/weight:columns"], up["d_normed2"])
        run(
            layernorm_backward_input_bf16,
            rows,
            up["d_normed2"],
            s["middle"],
            w["norm2/weight"],
            *norm2,
            d,
            up["d_middle"],
        )
        poll()
        run(product, rows, up["d_middle"], w["attention/output/weight:columns"], d_attended)
        batch, heads = microbatch.tokens.shape[0], self._model.heads
        attention = (d_attended, s["qkv"], s["attended"], s["lse"], batch, heads, up["d_qkv"])
        private = buffers.scratch["attention"]
        run(attention_backward_bf16, batch * heads, *attention, private=private, grain=1)
        poll()
        run(product, rows, up["d_qkv"], w["attention/qkv/weight:columns"], up["d_normed1"])
        # The block in front rounds the stream itself.
        unused = d_attended
        run(layernorm_backward_input_bf16, rows, up["d_normed1"], x, w["norm1/weight"], *norm1, d, unused)
        poll()

    def backward_weight(
        self, gradients: Arrays, microbatch: Microbatch, x: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Add the gradients of the four matrices, their biases and the two norms."""
        s, up, g = buffers.stash, buffers.upstream, gradients
        add_linear_gradients(s["activated"], up["d_out"], g, "mlp/down", buffers)
        poll()
        add_linear_gradients(s["normed2"], up["d_hidden"], g, "mlp/up", buffers)
        poll()
        norm2 = (s["mean2"], s["rstd2"], g["norm2/weight"], g["norm2/bias"])
        buffers.team.run(layernorm_backward_weight_bf16, x.shape[1], up["d_normed2"], s["middle"], *norm2)
        add_linear_gradients(s["attended"], up["d_middle"], g, "attention/output", buffers)
        poll()
        add_linear_gradients(s["normed1"], up["d_qkv"], g, "attention/qkv", buffers)
        norm1 = (s["mean1"], s["rstd1"], g["norm1/weight"], g["norm1/bias"])
        buffers.team.run(layernorm_backward_weight_bf16, x.shape[1], up["d_normed1"], x, *norm1)
        poll()

    def recompute(self, weights: Arrays, x: np.ndarray, buffers: Buffers, poll: Poll) -> None:
        """Compute the outputs of both norms and of GELU again."""
        s, w, run, rows = buffers.stash, weights, buffers.team.run, len(x)
        norm1, norm2 = (s["normed1"], s["mean1"], s["rstd1"]), (s["normed2"], s["mean2"], s["rstd2"])
        run(layernorm_forward_bf16, rows, x, w["norm1/weight"], w["norm1/bias"], *norm1)
        run(layernorm_forward_bf16, rows, s["middle"], w["norm2/weight"], w["norm2/bias"], *norm2)
        run(gelu_again, rows, s["hidden"], s["activated"])
        poll()
