"""The matrices of a stage as bfloat16 products read them: packed, and packed again after every update."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from hpcpipe.kernels.panels import pack_columns, pack_rows, panel_elements
from hpcpipe.kernels.threads import Team
from hpcpipe.memory.layout import new_arrays
from hpcpipe.model.layer import Layer
from hpcpipe.model.tensors import BufferSpec, TensorSpec


def packed_tensors(layers: Sequence[Layer], stored: Collection[str]) -> dict[str, TensorSpec]:
    """Return the matrices that are packed, under the name of the tensor that is stored on the stage.

    Parameters
    ----------
    layers : sequence of Layer
        The stage's layers.
    stored : collection of str
        Names of the tensors with storage there.
    """
    return {
        tensor.name if tensor.name in stored else tensor.tied_to: tensor
        for layer in layers
        for tensor in layer.tensors
        if tensor.name.removeprefix(layer.prefix) in layer.packed
    }


def panel_specs(tensors: Mapping[str, TensorSpec]) -> dict[str, BufferSpec]:
    """Return the buffers of packed matrices: ``<name>:rows`` and ``<name>:columns``."""
    specs = {}
    for name, tensor in tensors.items():
        rows, columns = tensor.shape
        specs[f"{name}:rows"] = BufferSpec((panel_elements(rows, columns),), np.dtype(np.uint16))
        specs[f"{name}:columns"] = BufferSpec((panel_elements(columns, rows),), np.dtype(np.uint16))
    return specs


class PackedWeights:
    """Panels of a stage's matrices, in both directions.

    Parameters
    ----------
    layers : sequence of Layer
        The stage's layers.
    weights : mapping of ndarray
        The stored tensors in float32, by global name; only read.
    """

    def __init__(self, layers: Sequence[Layer], weights: Mapping[str, np.ndarray]) -> None:
        self._weights = weights
        self._tensors = packed_tensors(layers, weights.keys())
        self.arrays = new_arrays(panel_specs(self._tensors), "packed weights")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the panels of a stored tensor, for products with it and with its transpose."""
        return self.arrays[f"{name}:rows"], self.arrays[f"{name}:columns"]

    def views(self, layer: Layer) -> Iterator[tuple[str, np.ndarray]]:
        """Yield a layer's panels with their local names."""
        for tensor in layer.tensors:
            local = tensor.name.removeprefix(layer.prefix)
            if local in layer.packed:
                rows, columns = self.of(tensor.name if tensor.name in self._tensors else tensor.tied_to)
                yield f"{local}:rows", rows
                yield f"{local}:columns", columns

    def pack(self, team: Team, but: Collection[str] = ()) -> None:
        """Pack all matrices but some from their float32 values, on the threads of a rank."""
        for name in self._tensors:
            if name in but:
                continue
            weight, (rows, columns) = self._weights[name], self.of(name)
            team.run(pack_rows, len(weight), weight, rows)
            team.run(pack_columns, len(weight), weight, columns)
