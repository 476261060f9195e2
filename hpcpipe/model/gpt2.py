"""The layers of a GPT-2 model, and what they add up to."""

from collections.abc import Callable, Sequence

from hpcpipe.config.schema import ModelConfig
from hpcpipe.model.block_f32 import Float32Block
from hpcpipe.model.embedding import Embedding
from hpcpipe.model.head_f32 import Float32Head
from hpcpipe.model.layer import Layer


def build_layers(model: ModelConfig, precision: str = "f32") -> tuple[Layer, ...]:
    """Return the embedding, the blocks and the head, in order.

    Parameters
    ----------
    model : ModelConfig
        With `vocab` resolved (not 0).
    precision : str
        ``bf16`` for bfloat16 operands; else float32.
    """
    block, head = _kinds(precision)
    return (Embedding(model), *(block(model, index) for index in range(model.layers)), head(model))


def _kinds(precision: str) -> tuple[Callable[[ModelConfig, int], Layer], Callable[[ModelConfig], Layer]]:
    """Return what makes a block and a head; the kernels of the other precision are not loaded."""
    if precision != "bf16":
        return Float32Block, Float32Head
    from hpcpipe.model.block_bf16 import BFloat16Block
    from hpcpipe.model.head_bf16 import BFloat16Head

    return BFloat16Block, BFloat16Head


def count_parameters(layers: Sequence[Layer]) -> int:
    """Return the number of trained values, tied tensors counted once."""
    return sum(tensor.size for layer in layers for tensor in layer.tensors if not tensor.tied_to)


def training_flops_per_sample(layers: Sequence[Layer]) -> int:
    """Return the model FLOPs of one sample's forward and backward: three times the forward, nothing recomputed."""
    return 3 * sum(layer.forward_flops(1) for layer in layers)
