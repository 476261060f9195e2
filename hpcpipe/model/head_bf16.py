"""The last layer with bfloat16 operands: logits are written once, in bfloat16, and read once."""

import numpy as np

from hpcpipe.kernels.bfloat16 import from_bfloat16
from hpcpipe.kernels.head import cross_entropy_backward_bf16, cross_entropy_forward_bf16, head_logits
from hpcpipe.kernels.norm_bf16 import (
    layernorm_backward_input_bf16,
    layernorm_backward_weight_bf16,
    layernorm_forward_bf16,
)
from hpcpipe.kernels.products import DEEP_ROWS, product_deep
from hpcpipe.model.head import Head
from hpcpipe.model.layer import Arrays, Buffers, Microbatch, Poll
from hpcpipe.model.linear_bf16 import add_matrix_gradient, gradient_scratch
from hpcpipe.model.tensors import BufferShapes, bf16, f32

_LANES = 16


class BFloat16Head(Head):
    """Turns the residual stream into logits and a loss, for ``train.precision = "bf16"``.

    Parameters
    ----------
    model : ModelConfig
        With `vocab` resolved. If `tied`, the logits use the values of the token embedding.
    """

    cheap = ("normed",)
    packed = ("weight",)

    @property
    def _padded_vocab(self) -> int:
        """Columns of logits in memory: whole blocks, so that every row starts a cache line."""
        return -(-self._model.vocab // 32) * 32

    def stash_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the normed stream, the logits, and what is known of each row's exponentials."""
        rows, width = batch * self._model.context, self._model.width
        return {
            "normed": bf16(rows, width),
            "mean": f32(rows),
            "rstd": f32(rows),
            "logits": bf16(rows, self._padded_vocab),
            "lse": f32(rows),
        }

    def upstream_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the gradients of logits and normed stream."""
        rows = batch * self._model.context
        return {"d_logits": bf16(rows, self._padded_vocab), "d_normed": bf16(rows, self._model.width)}

    def scratch_shapes(self, batch: int, num_threads: int = 1) -> BufferShapes:
        """Return the shapes of the scratch of the three calls."""
        rows, width = batch * self._model.context, self._model.width
        return {
            "highest": f32(rows),
            "totals": f32(rows, _LANES),
            "sums": f32(num_threads, DEEP_ROWS, -(-width // 32) * 32),
            "rounded": bf16(rows, width),
            **gradient_scratch(rows, width, num_threads),
        }

    def logits(self, stash: Arrays, row: int, out: np.ndarray) -> None:
        """Copy the logits of a row to float32 `out`, shape (vocab,)."""
        from_bfloat16(stash["logits"][row : row + 1, : len(out)], out[None])

    def forward(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, out: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Compute the logits, and the loss of the microbatch; `out` is not written."""
        s, scratch, run, rows = buffers.stash, buffers.scratch, buffers.team.run, len(x)
        norm = (weights["norm/weight"], weights["norm/bias"], s["normed"], s["mean"], s["rstd"])
        run(layernorm_forward_bf16, rows, x, *norm)
        vocab, exponentials = self._model.vocab, (scratch["highest"], scratch["totals"])
        run(head_logits, rows, s["normed"], weights["weight:columns"], vocab, s["logits"], *exponentials)
        poll()
        targets, coefficients = microbatch.targets.reshape(-1), microbatch.coefficients.reshape(-1)
        loss = cross_entropy_forward_bf16(s["logits"], targets, coefficients, *exponentials, s["lse"])
        microbatch.loss = float(loss)
        poll()

    def backward_input(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, d: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Fill `d` with the gradient of the loss; what it held before is not read."""
        s, up, scratch, run, rows = buffers.stash, buffers.upstream, buffers.scratch, buffers.team.run, len(x)
        targets, coefficients = microbatch.targets.reshape(-1), microbatch.coefficients.reshape(-1)
        vocab, table, d_logits = self._model.vocab, weights["weight:rows"], up["d_logits"]
        run(cross_entropy_backward_bf16, rows, s["logits"], vocab, targets, coefficients, s["lse"], d_logits)
        poll()
        run(product_deep, rows, d_logits, table, vocab, up["d_normed"], private=scratch["sums"])
        d.fill(0.0)
        norm = (weights["norm/weight"], s["mean"], s["rstd"])
        run(layernorm_backward_input_bf16, rows, up["d_normed"], x, *norm, d, scratch["rounded"])
        poll()

    def backward_weight(
        self, gradients: Arrays, microbatch: Microbatch, x: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Add the gradients of the vocabulary matrix and the final norm."""
        s, up = buffers.stash, buffers.upstream
        add_matrix_gradient(up["d_logits"], s["normed"], gradients["weight"], buffers)
        poll()
        norm = (s["mean"], s["rstd"], gradients["norm/weight"], gradients["norm/bias"])
        buffers.team.run(layernorm_backward_weight_bf16, x.shape[1], up["d_normed"], x, *norm)
        poll()

    def recompute(self, weights: Arrays, x: np.ndarray, buffers: Buffers, poll: Poll) -> None:
        """Compute the output of the norm again."""
        s = buffers.stash
        norm = (weights["norm/weight"], weights["norm/bias"], s["normed"], s["mean"], s["rstd"])
        buffers.team.run(layernorm_forward_bf16, len(x), x, *norm)
        poll()
