"""The last layer: final LayerNorm, logits over the vocabulary, and the cross-entropy loss.

What it owns and costs, in either precision.
"""

from abc import ABC, abstractmethod

import numpy as np

from hpcpipe.config.schema import ModelConfig
from hpcpipe.model.embedding import INITIAL_STD, TOKEN_TABLE
from hpcpipe.model.layer import Arrays, KeepsEverything
from hpcpipe.model.tensors import TensorSpec

TABLE = "head/weight"


class Head(KeepsEverything, ABC):
    """Turns the residual stream into logits and a loss, without the arithmetic.

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

    @abstractmethod
    def logits(self, stash: Arrays, row: int, out: np.ndarray) -> None:
        """Copy the logits of a row to float32 `out`, shape (vocab,)."""

    def forward_flops(self, batch: int) -> int:
        """Return the FLOPs of the product with the vocabulary: 2 C V per token."""
        return 2 * batch * self._model.context * self._model.width * self._model.vocab
