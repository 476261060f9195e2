"""The layers of a GPT-2 model, and what they add up to."""

from collections.abc import Sequence

from hpcpipe.config.schema import ModelConfig
from hpcpipe.model.block import Block
from hpcpipe.model.embedding import Embedding
from hpcpipe.model.head import Head
from hpcpipe.model.layer import Layer


def build_layers(model: ModelConfig) -> tuple[Layer, ...]:
    """Return the embedding, the blocks and the head, in order.

    Parameters
    ----------
    model : ModelConfig
        With `vocab` resolved (not 0).
    """
    blocks = (Block(model, index) for index in range(model.layers))
    return (Embedding(model), *blocks, Head(model))


def count_parameters(layers: Sequence[Layer]) -> int:
    """Return the number of trained values, tied tensors counted once."""
    return sum(tensor.size for layer in layers for tensor in layer.tensors if not tensor.tied_to)


def training_flops_per_sample(layers: Sequence[Layer]) -> int:
    """Return the model FLOPs of one sample's forward and backward: three times the forward, nothing recomputed."""
    return 3 * sum(layer.forward_flops(1) for layer in layers)
