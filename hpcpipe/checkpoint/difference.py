"""How two checkpoints differ, and by how much, whatever grids and versions of the format wrote them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcpipe.checkpoint.compare import Difference, differences
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.table import Manifest, TensorEntry
from hpcpipe.checkpoint.verify import verify_metadata
from hpcpipe.errors import DamagedError

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TensorDifference:
    """One kind of a tensor that both checkpoints have.

    Attributes
    ----------
    name, kind : str
    type_a, type_b : str
        Shape and dtype, such as ``float32[768, 50257]``; elements are compared only if they are the same.
    num_elements, num_differing : int
        Elements, and those of them that differ in a bit.
    largest_absolute, largest_relative : float
        Of ``|a - b|``, and of ``|a - b| / max(|a|, |b|)``; infinite where one is not a finite number.
    """

    name: str
    kind: str
    type_a: str
    type_b: str
    num_elements: int = 0
    num_differing: int = 0
    largest_absolute: float = 0.0
    largest_relative: float = 0.0

    @property
    def is_identical(self) -> bool:
        """Whether every bit is the same."""
        return self.type_a == self.type_b and self.num_differing == 0


@dataclass(frozen=True)
class Comparison:
    """What `compare_checkpoints` found.

    Attributes
    ----------
    header : list of Difference
        Keys of the headers that differ.
    only_a, only_b : list of (str, str)
        Name and kind of what the other one lacks.
    tensors : list of TensorDifference
        Of all that both have, the identical ones included.
    """

    header: list[Difference]
    only_a: list[tuple[str, str]]
    only_b: list[tuple[str, str]]
    tensors: list[TensorDifference]

    @property
    def is_identical(self) -> bool:
        """Whether a run would go on from both in the same way: the same step, and the same bits in every tensor."""
        same_step = all(difference.key != "step" for difference in self.header)
        same_tensors = all(tensor.is_identical for tensor in self.tensors)
        return same_step and same_tensors and not self.only_a and not self.only_b


def compare_checkpoints(a: Path, b: Path) -> Comparison:
    """Compare two checkpoints element by element, in blocks.

    Parameters
    ----------
    a, b : Path
        Directories of committed checkpoints.

    Returns
    -------
    Comparison

    Raises
    ------
    DamagedError
        One of them is not what was written. Tensors that only one of them has are not read.
    """
    manifests = [_load(path) for path in (a, b)]
    held_a, held_b = (
        {(name, kind): tensor for name, tensor in manifest.tensors.items() for kind in tensor.kinds}
        for manifest in manifests
    )
    with Reader(a, manifests[0]) as reader_a, Reader(b, manifests[1]) as reader_b:
        tensors = [
            _compare_tensor(name, kind, (reader_a, tensor), (reader_b, held_b[name, kind]))
            for (name, kind), tensor in held_a.items()
            if (name, kind) in held_b
        ]
    return Comparison(
        differences(manifests[0].header, manifests[1].header),
        [key for key in held_a if key not in held_b],
        [key for key in held_b if key not in held_a],
        tensors,
    )


def _load(path: Path) -> Manifest:
    """Read a manifest, and check what the reader of tensors does not."""
    manifest = load_manifest(path)
    problems = [problem for name in manifest.files for problem in verify_metadata(path, manifest, name)]
    if problems:
        raise DamagedError("; ".join(problems))
    return manifest


def _compare_tensor(
    name: str, kind: str, a: tuple[Reader, TensorEntry], b: tuple[Reader, TensorEntry]
) -> TensorDifference:
    """Compare one kind of one tensor."""
    type_a, type_b = (f"{tensor.dtype}{list(tensor.shape)}" for _, tensor in (a, b))
    if type_a != type_b:
        return TensorDifference(name, kind, type_a, type_b)
    num_differing, absolute, relative = 0, 0.0, 0.0
    for left, right in zip(_blocks(name, kind, *a), _blocks(name, kind, *b), strict=True):
        differ = _bits(left) != _bits(right)
        count = int(np.count_nonzero(differ))
        if count:
            num_differing += count
            found = _largest(left[differ], right[differ])
            absolute, relative = max(absolute, found[0]), max(relative, found[1])
    return TensorDifference(name, kind, type_a, type_b, a[1].size, num_differing, absolute, relative)


def _blocks(name: str, kind: str, reader: Reader, tensor: TensorEntry) -> Iterator[NDArray[Any]]:
    """Read a tensor block by block; each block is overwritten by the next."""
    block = np.empty(min(_BLOCK_ELEMENTS, tensor.size), tensor.dtype)
    for start in range(0, tensor.size, _BLOCK_ELEMENTS):
        part = block[: min(_BLOCK_ELEMENTS, tensor.size - start)]
        reader.read(name, kind, part, start, start + part.size)
        yield part


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(f"u{values.itemsize}")


def _largest(a: NDArray[Any], b: NDArray[Any]) -> tuple[float, float]:
    """Return the largest absolute and relative difference of elements that differ."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf, math.inf
    with np.errstate(over="ignore"):
        if a.dtype.kind == "f":
            a, b = a.astype(np.float64), b.astype(np.float64)
            absolute = np.abs(a - b)
        else:
            # Where the difference of signed integers overflows, its bits are those of the unsigned one.
            absolute = _bits(np.maximum(a, b) - np.minimum(a, b)).astype(np.float64)
            a, b = a.astype(np.float64), b.astype(np.float64)
    scale = np.maximum(np.abs(a), np.abs(b))
    relative = np.divide(absolute, scale, out=np.zeros_like(absolute), where=scale > 0)
    return float(absolute.max()), float(relative.max())
