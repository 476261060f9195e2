"""The transformer block in float32. Buffers are named in `hpcpipe.model.block`."""

import numpy as np

from hpcpipe.kernels.activation import gelu_backward, gelu_forward
from hpcpipe.kernels.attention import attention_backward, attention_forward, attention_scratch
from hpcpipe.kernels.gemm import matmul_bias, matmul_nt
from hpcpipe.kernels.norm import layernorm_backward_input, layernorm_backward_weight, layernorm_forward
from hpcpipe.kernels.reduce import add_into
from hpcpipe.model.block import Block
from hpcpipe.model.layer import Arrays, Buffers, Microbatch, Poll
from hpcpipe.model.linear import add_linear_gradients
from hpcpipe.model.tensors import BufferShapes, f32


class Float32Block(Block):
    """Block number `index` of a model, for ``train.precision = "f32"``.

    Parameters
    ----------
    model : ModelConfig
        Shape of the model.
    index : int
        Position among the blocks, from 0.
    """

    packed: tuple[str, ...] = ()
    cheap = ("normed1", "normed2", "activated")

    def stash_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the activations that the backward reads."""
        context, width, heads = self._model.context, self._model.width, self._model.heads
        rows = batch * context
        return {
            "normed1": f32(rows, width),
            "mean1": f32(rows),
            "rstd1": f32(rows),
            "qkv": f32(rows, 3 * width),
            "attended": f32(rows, width),
            "lse": f32(batch, heads, context),
            "middle": f32(rows, width),
            "normed2": f32(rows, width),
            "mean2": f32(rows),
            "rstd2": f32(rows),
            "hidden": f32(rows, 4 * width),
            "activated": f32(rows, 4 * width),
        }

    def upstream_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the gradients that enter each matrix and norm from behind."""
        rows, width = batch * self._model.context, self._model.width
        return {
            "d_out": f32(rows, width),
            "d_hidden": f32(rows, 4 * width),
            "d_normed2": f32(rows, width),
            "d_middle": f32(rows, width),
            "d_qkv": f32(rows, 3 * width),
            "d_normed1": f32(rows, width),
        }

    def scratch_shapes(self, batch: int, num_threads: int = 1) -> BufferShapes:
        """Return the shapes of the scratch of the three calls."""
        model = self._model
        forward, backward_input, backward_weight = range(3)
        return {
            "attention": f32(attention_scratch(model.context, model.width, model.heads)).used_in(
                forward, backward_input
            ),
            "d_attended": f32(batch * model.context, model.width).used_in(backward_input),
            "matrix": f32(4 * model.width * model.width).used_in(backward_weight),
            "bias": f32(4 * model.width).used_in(backward_weight),
            "norm": f32(2, model.width).used_in(backward_weight),
        }

    def forward(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, out: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Compute attention and perceptron, each added to the residual stream."""
        s, batch = buffers.stash, microbatch.tokens.shape[0]
        middle = s["middle"]
        layernorm_forward(x, weights["norm1/weight"], weights["norm1/bias"], s["normed1"], s["mean1"], s["rstd1"])
        matmul_bias(s["normed1"], weights["attention/qkv/weight"], weights["attention/qkv/bias"], s["qkv"])
        poll()
        attention_forward(s["qkv"], batch, self._model.heads, s["attended"], s["lse"], buffers.scratch["attention"])
        poll()
        matmul_bias(s["attended"], weights["attention/output/weight"], weights["attention/output/bias"], middle)
        add_into(middle.reshape(-1), x.reshape(-1))
        layernorm_forward(middle, weights["norm2/weight"], weights["norm2/bias"], s["normed2"], s["mean2"], s["rstd2"])
        matmul_bias(s["normed2"], weights["mlp/up/weight"], weights["mlp/up/bias"], s["hidden"])
        poll()
        gelu_forward(s["hidden"], s["activated"])
        matmul_bias(s["activated"], weights["mlp/down/weight"], weights["mlp/down/bias"], out)
        add_into(out.reshape(-1), middle.reshape(-1))
        poll()

    def backward_input(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, d: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Walk the block from behind; `d` follows the residual stream in place."""
        s, up, batch = buffers.stash, buffers.upstream, microbatch.tokens.shape[0]
        np.copyto(up["d_out"], d)
        matmul_nt(d, weights["mlp/down/weight"], up["d_hidden"])
        gelu_backward(up["d_hidden"], s["hidden"], up["d_hidden"])
        poll()
        matmul_nt(up["d_hidden"], weights["mlp/up/weight"], up["d_normed2"])
        layernorm_backward_input(up["d_normed2"], s["middle"], weights["norm2/weight"], s["mean2"], s["rstd2"], d)
        np.copyto(up["d_middle"], d)
        poll()
        d_attended = buffers.scratch["d_attended"]
        matmul_nt(d, weights["attention/output/weight"], d_attended)
        attention_backward(
            d_attended,
            s["qkv"],
            s["attended"],
            s["lse"],
            batch,
            self._model.heads,
            up["d_qkv"],
            buffers.scratch["attention"],
        )
        poll()
        matmul_nt(up["d_qkv"], weights["attention/qkv/weight"], up["d_normed1"])
        layernorm_backward_input(up["d_normed1"], x, weights["norm1/weight"], s["mean1"], s["rstd1"], d)
        poll()

    def backward_weight(
        self, gradients: Arrays, microbatch: Microbatch, x: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Add the gradients of the four matrices, their biases and the two norms."""
        s, up, scratch = buffers.stash, buffers.upstream, buffers.scratch
        add_linear_gradients(s["activated"], up["d_out"], gradients, "mlp/down", scratch)
        poll()
        add_linear_gradients(s["normed2"], up["d_hidden"], gradients, "mlp/up", scratch)
        poll()
        layernorm_backward_weight(
            up["d_normed2"],
            s["middle"],
            s["mean2"],
            s["rstd2"],
            gradients["norm2/weight"],
            gradients["norm2/bias"],
            scratch["norm"],
        )
        add_linear_gradients(s["attended"], up["d_middle"], gradients, "attention/output", scratch)
        poll()
        add_linear_gradients(s["normed1"], up["d_qkv"], gradients, "attention/qkv", scratch)
        layernorm_backward_weight(
            up["d_normed1"],
            x,
            s["mean1"],
            s["rstd1"],
            gradients["norm1/weight"],
            gradients["norm1/bias"],
            scratch["norm"],
        )
        poll()

    def recompute(self, weights: Arrays, x: np.ndarray, buffers: Buffers, poll: Poll) -> None:
        """Compute the outputs of both norms and of GELU again."""
        s = buffers.stash
        norm1, norm2 = (s["normed1"], s["mean1"], s["rstd1"]), (s["normed2"], s["mean2"], s["rstd2"])
        layernorm_forward(x, weights["norm1/weight"], weights["norm1/bias"], *norm1)
        layernorm_forward(s["middle"], weights["norm2/weight"], weights["norm2/bias"], *norm2)
        gelu_forward(s["hidden"], s["activated"])
        poll()
