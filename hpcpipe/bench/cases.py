"""What ``hpcpipe bench gemm`` times: the kernels of a model's layers, each on buffers of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from typing import Any

import numpy as np

from hpcpipe.config.schema import ModelConfig
from hpcpipe.kernels import adamw, embedding
from hpcpipe.kernels.threads import Team
from hpcpipe.memory.layout import new_arrays
from hpcpipe.model.tensors import BufferSpec, f32

PRODUCTS, ATTENTION, MEMORY = "products", "attention", "memory"
"""The groups: products of matrices, attention, and what is bound by memory."""

FORWARD, INPUT, WEIGHT = "forward", "input gradient", "weight gradient"
"""The uses of a matrix."""

NAME = "bench"
"""What the buffers are counted under."""

Run = Callable[[Team], None]

_RATES = (1.0, 1e-9, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05)
_RANDOM = 1 << 20
_MICROBATCHES = 32


@dataclass(frozen=True)
class Shape:
    """What the kernels are timed for.

    Attributes
    ----------
    model : ModelConfig
        With the vocabulary.
    batch, context : int
        Samples of a microbatch, and tokens of each.
    num_threads : int
        Of the largest team.
    """

    model: ModelConfig
    batch: int
    context: int
    num_threads: int

    @property
    def rows(self) -> int:
        """Rows of every activation."""
        return self.batch * self.context

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return the inputs and outputs of each matrix of a block, and of the head's."""
        width = self.model.width
        return {
            "qkv": (width, 3 * width),
            "output": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
            "head": (width, self.model.vocab),
        }


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes
    ----------
    group, name, use : str
        Where it stands in the report.
    end : str
        What is done with the result while it is in cache; empty for nothing, and where kernels do it by themselves.
    shape : tuple of int
        Rows, contraction and columns of a product; rows and columns of what else is read.
    make : callable
        Makes buffers, and returns what is timed on them.
    """

    group: str
    name: str
    use: str
    shape: tuple[int, ...]
    make: Callable[[], Run]
    end: str = ""


def build_cases(shape: Shape, precision: str) -> list[Case]:
    """Return everything that is timed; the kernels of the other precision are not loaded.

    Parameters
    ----------
    shape : Shape
        Of the model and a microbatch.
    precision : str
        ``bf16`` or ``f32``.
    """
    if precision == "bf16":
        from hpcpipe.bench.cases_bf16 import bfloat16_cases

        return [*bfloat16_cases(shape), *_shared_cases(shape)]
    from hpcpipe.bench.cases_f32 import float32_cases

    return [*float32_cases(shape), _adamw_case(shape), *_shared_cases(shape)]


def random_arrays(specs: Mapping[str, BufferSpec]) -> dict[str, np.ndarray]:
    """Return new buffers of random numbers: float32 around zero, bfloat16 bits of such."""
    arrays = new_arrays(specs, NAME)
    values, bits = _random_values()
    for array in arrays.values():
        flat = array.reshape(-1)
        source = bits if flat.dtype == np.uint16 else values
        for start in range(0, flat.size, _RANDOM):
            part = flat[start : start + _RANDOM]
            part[:] = source[: part.size]
    return arrays


def random_ids(shape: tuple[int, ...], vocab: int, seed: int = 1) -> np.ndarray:
    """Return random token ids, int32."""
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


@cache
def _random_values() -> tuple[np.ndarray, np.ndarray]:
    """Return some normal numbers, and their bits in bfloat16."""
    values = np.random.default_rng(1).standard_normal(_RANDOM, np.float32)
    return values, (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _adamw_case(shape: Shape) -> Case:
    inputs, outputs = shape.matrices()["up"]

    def make() -> Run:
        arrays = random_arrays({name: f32(inputs * outputs) for name in ("weight", "gradient", "moment1", "moment2")})
        np.abs(arrays["moment2"], out=arrays["moment2"])
        arguments: tuple[Any, ...] = (*arrays.values(), *_RATES)
        return lambda team: adamw.adamw_update(*arguments)

    return Case(MEMORY, "AdamW", "update", (inputs, outputs), make)


def adamw_pack_case(shape: Shape) -> Case:
    """Return the update of a matrix that products read packed."""
    from hpcpipe.kernels.adamw_bf16 import adamw_pack
    from hpcpipe.kernels.panels import panel_elements
    from hpcpipe.model.tensors import bf16

    inputs, outputs = shape.matrices()["up"]

    def make() -> Run:
        matrices = random_arrays({name: f32(inputs, outputs) for name in ("weight", "gradient", "moment1", "moment2")})
        np.abs(matrices["moment2"], out=matrices["moment2"])
        packed = random_arrays(
            {"rows": bf16(panel_elements(inputs, outputs)), "columns": bf16(panel_elements(outputs, inputs))}
        )
        arguments = (*matrices.values(), *_RATES, *packed.values())
        return lambda team: team.run(adamw_pack, inputs, *arguments)

    return Case(MEMORY, "AdamW and packing", "update", (inputs, outputs), make)


def _shared_cases(shape: Shape) -> list[Case]:
    """Return the embedding, which is float32 in either precision."""
    size = shape.rows, shape.model.width
    return [
        Case(MEMORY, "embedding", FORWARD, size, partial(_embedding, shape, True)),
        Case(MEMORY, "embedding", WEIGHT, size, partial(_embedding, shape, False)),
    ]


def _embedding(shape: Shape, is_forward: bool) -> Run:
    rows, width, vocab, size = shape.rows, shape.model.width, shape.model.vocab, (shape.batch, shape.context)
    tokens, positions, stream = random_arrays(
        {"tokens": f32(vocab, width), "positions": f32(shape.context, width), "stream": f32(rows, width)}
    ).values()
    # Other rows of the table each time, since those of the last time are in a cache.
    ids = cycle([random_ids(size, vocab, seed) for seed in range(_MICROBATCHES)])
    if is_forward:
        return lambda team: embedding.embedding_forward(next(ids), tokens, positions, stream)
    return lambda team: embedding.embedding_backward_weight(next(ids), stream, tokens, positions)
