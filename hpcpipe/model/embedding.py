"""The first layer: token and position embeddings."""

import numpy as np

from hpcpipe.config.schema import ModelConfig
from hpcpipe.kernels import embedding
from hpcpipe.model.layer import Arrays, Buffers, KeepsEverything, Microbatch, Poll
from hpcpipe.model.tensors import BufferShapes, TensorSpec, f32

TOKEN_TABLE = "embedding/token/weight"
INITIAL_STD = 0.02


class Embedding(KeepsEverything):
    """Adds a token's vector to its position's.

    Parameters
    ----------
    model : ModelConfig
        With `vocab` resolved.
    """

    prefix = "embedding/"
    packed: tuple[str, ...] = ()

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self.tensors = (
            TensorSpec(TOKEN_TABLE, (model.vocab, model.width), initial_std=INITIAL_STD),
            TensorSpec("embedding/position/weight", (model.context, model.width), initial_std=INITIAL_STD),
        )

    def stash_shapes(self, batch: int) -> BufferShapes:
        """Return no shapes: the microbatch's tokens are all that the backward needs."""
        return {}

    def upstream_shapes(self, batch: int) -> BufferShapes:
        """Return the shape of the gradient of the output."""
        return {"d_out": f32(batch * self._model.context, self._model.width)}

    def scratch_shapes(self, batch: int, num_threads: int = 1) -> BufferShapes:
        """Return no shapes."""
        return {}

    def forward_flops(self, batch: int) -> int:
        """Return the additions of one vector per token."""
        return batch * self._model.context * self._model.width

    def forward(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, out: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Write the embedded tokens to `out`; `x` is not read."""
        embedding.embedding_forward(microbatch.tokens, weights["token/weight"], weights["position/weight"], out)

    def backward_input(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, d: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Keep `d` for the weight gradient: tokens have no gradient."""
        np.copyto(buffers.upstream["d_out"], d)

    def backward_weight(
        self, gradients: Arrays, microbatch: Microbatch, x: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Add each row's gradient to the rows of both tables."""
        embedding.embedding_backward_weight(
            microbatch.tokens, buffers.upstream["d_out"], gradients["token/weight"], gradients["position/weight"]
        )
