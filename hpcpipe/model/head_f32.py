"""The last layer in float32."""

import numpy as np

from hpcpipe.kernels.gemm import matmul, matmul_nt
from hpcpipe.kernels.loss import cross_entropy_backward, cross_entropy_forward
from hpcpipe.kernels.norm import layernorm_backward_input, layernorm_backward_weight, layernorm_forward
from hpcpipe.model.head import Head
from hpcpipe.model.layer import Arrays, Buffers, Microbatch, Poll
from hpcpipe.model.linear import add_matrix_gradient
from hpcpipe.model.tensors import BufferShapes, f32


class Float32Head(Head):
    """Turns the residual stream into logits and a loss, for ``train.precision = "f32"``.

    Parameters
    ----------
    model : ModelConfig
        With `vocab` resolved. If `tied`, the logits use the values of the token embedding.
    """

    packed: tuple[str, ...] = ()
    cheap = ("normed",)

    def stash_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the normed stream, the logits, and the log-sum-exp of each row."""
        rows, width = batch * self._model.context, self._model.width
        return {
            "normed": f32(rows, width),
            "mean": f32(rows),
            "rstd": f32(rows),
            "logits": f32(rows, self._model.vocab),
            "lse": f32(rows),
        }

    def upstream_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the gradients of logits and normed stream."""
        rows = batch * self._model.context
        return {"d_logits": f32(rows, self._model.vocab), "d_normed": f32(rows, self._model.width)}

    def scratch_shapes(self, batch: int, num_threads: int = 1) -> BufferShapes:
        """Return the shapes of the scratch of the weight gradient."""
        return {"matrix": f32(self._model.vocab * self._model.width), "norm": f32(2, self._model.width)}

    def logits(self, stash: Arrays, row: int, out: np.ndarray) -> None:
        """Copy the logits of a row to float32 `out`, shape (vocab,)."""
        np.copyto(out, stash["logits"][row])

    def forward(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, out: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Compute the logits, and the loss of the microbatch; `out` is not written."""
        s = buffers.stash
        layernorm_forward(x, weights["norm/weight"], weights["norm/bias"], s["normed"], s["mean"], s["rstd"])
        matmul_nt(s["normed"], weights["weight"], s["logits"])
        poll()
        targets, coefficients = microbatch.targets.reshape(-1), microbatch.coefficients.reshape(-1)
        microbatch.loss = float(cross_entropy_forward(s["logits"], targets, coefficients, s["lse"]))
        poll()

    def backward_input(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, d: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Fill `d` with the gradient of the loss; what it held before is not read."""
        s, up = buffers.stash, buffers.upstream
        targets, coefficients = microbatch.targets.reshape(-1), microbatch.coefficients.reshape(-1)
        cross_entropy_backward(s["logits"], targets, coefficients, s["lse"], up["d_logits"])
        poll()
        matmul(up["d_logits"], weights["weight"], up["d_normed"])
        d.fill(0.0)
        layernorm_backward_input(up["d_normed"], x, weights["norm/weight"], s["mean"], s["rstd"], d)
        poll()

    def backward_weight(
        self, gradients: Arrays, microbatch: Microbatch, x: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Add the gradients of the vocabulary matrix and the final norm."""
        s, up, scratch = buffers.stash, buffers.upstream, buffers.scratch
        add_matrix_gradient(up["d_logits"], s["normed"], gradients["weight"], scratch)
        poll()
        layernorm_backward_weight(
            up["d_normed"], x, s["mean"], s["rstd"], gradients["norm/weight"], gradients["norm/bias"], scratch["norm"]
        )
        poll()

    def recompute(self, weights: Arrays, x: np.ndarray, buffers: Buffers, poll: Poll) -> None:
        """Compute the output of the norm again."""
        s = buffers.stash
        layernorm_forward(x, weights["norm/weight"], weights["norm/bias"], s["normed"], s["mean"], s["rstd"])
        poll()
