"""The transformer block of GPT-2: pre-LayerNorm, causal attention, and a two-layer perceptron with GELU.

What it owns and costs, in either precision. Buffers are named after what they hold; R is batch * context, C the width:
``normed1`` (R, C), ``qkv`` (R, 3C), ``attended`` (R, C), ``middle`` (R, C; the residual stream between the two halves),
``normed2`` (R, C), ``hidden`` and ``activated`` (R, 4C).
"""

import math

from hpcpipe.config.schema import ModelConfig
from hpcpipe.model.embedding import INITIAL_STD
from hpcpipe.model.layer import KeepsEverything
from hpcpipe.model.tensors import TensorSpec


class Block(KeepsEverything):
    """Block number `index` of a model, without its arithmetic.

    Parameters
    ----------
    model : ModelConfig
        Shape of the model.
    index : int
        Position among the blocks, from 0.
    """

    def __init__(self, model: ModelConfig, index: int) -> None:
        self._model = model
        self.prefix = f"layers/{index:03d}/"
        width = model.width
        # The two matrices that write to the residual stream start smaller, so that its size does not grow with
        # depth (Radford et al., "Language Models are Unsupervised Multitask Learners", section 2.3).
        residual_std = INITIAL_STD / math.sqrt(2 * model.layers)
        self.tensors = (
            *self._norm("norm1"),
            *self._linear("attention/qkv", width, 3 * width, INITIAL_STD),
            *self._linear("attention/output", width, width, residual_std),
            *self._norm("norm2"),
            *self._linear("mlp/up", width, 4 * width, INITIAL_STD),
            *self._linear("mlp/down", 4 * width, width, residual_std),
        )

    def _norm(self, name: str) -> tuple[TensorSpec, TensorSpec]:
        shape = (self._model.width,)
        return (
            TensorSpec(f"{self.prefix}{name}/weight", shape, initial_value=1.0),
            TensorSpec(f"{self.prefix}{name}/bias", shape),
        )

    def _linear(self, name: str, inputs: int, outputs: int, std: float) -> tuple[TensorSpec, TensorSpec]:
        return (
            TensorSpec(f"{self.prefix}{name}/weight", (inputs, outputs), initial_std=std),
            TensorSpec(f"{self.prefix}{name}/bias", (outputs,)),
        )

    def forward_flops(self, batch: int) -> int:
        """Return the FLOPs of the matrix products: 24 C^2 per token, and 4 C T per token of attention scores."""
        model = self._model
        return batch * model.context * model.width * (24 * model.width + 4 * model.context)
