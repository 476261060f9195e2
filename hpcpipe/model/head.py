"""The last layer: final LayerNorm, logits over the vocabulary, and the cross-entropy loss."""

import numpy as np

from hpcpipe.config.schema import ModelConfig
from hpcpipe.kernels.gemm import matmul, matmul_nt
from hpcpipe.kernels.loss import cross_entropy_backward, cross_entropy_forward
from hpcpipe.kernels.norm import layernorm_backward_input, layernorm_backward_weight, layernorm_forward
from hpcpipe.model.embedding import INITIAL_STD, TOKEN_TABLE
from hpcpipe.model.layer import Arrays, Buffers, Microbatch, Poll
from hpcpipe.model.linear import add_matrix_gradient
from hpcpipe.model.tensors import BufferShapes, TensorSpec, f32

TABLE = "head/weight"


class Head:
    """Turns the residual stream into logits and a loss.

    Parameters
    ----------
    model : ModelConfig
        With `vocab` resolved. If `tied`, the logits use the values of the token embedding.
    """

    prefix = "head/"

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        tied_to = TOKEN_TABLE if model.tied else ""
        self.tensors = (
            TensorSpec("head/norm/weight", (model.width,), initial_value=1.0),
            TensorSpec("head/norm/bias", (model.width,)),
            TensorSpec(TABLE, (model.vocab, model.width), initial_std=INITIAL_STD, tied_to=tied_to),
        )

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

    def scratch_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the scratch of the weight gradient."""
        return {"matrix": f32(self._model.vocab * self._model.width), "norm": f32(2, self._model.width)}

    def forward_flops(self, batch: int) -> int:
        """Return the FLOPs of the product with the vocabulary: 2 C V per token."""
        return 2 * batch * self._model.context * self._model.width * self._model.vocab

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
