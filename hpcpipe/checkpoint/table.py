"""The table of a manifest: files, tensors, pieces."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class RegionEntry:
    """What HDF5 keeps between tensors: where it begins, how long it is, and its digest in hexadecimal."""

    offset: int
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class FileEntry:
    """One file: its name, its size, its digest in hexadecimal, and since version 2 the regions around the pieces."""

    name: str
    size_bytes: int
    digest: str
    metadata: tuple[RegionEntry, ...] = ()


@dataclass(frozen=True)
class PieceEntry:
    """Elements ``[start, stop)`` of a tensor: the file, the byte where they begin, and their digest."""

    file: str
    start: int
    stop: int
    offset: int
    digest: str


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its shape and dtype, and for each kind the pieces that make it up, in ascending order."""

    shape: tuple[int, ...]
    dtype: str
    kinds: dict[str, tuple[PieceEntry, ...]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says about itself.

    Attributes
    ----------
    version : int
        Version of the format; says which hash the digests are of.
    step : int
        The number of optimizer updates made.
    header : dict
        ``step``, ``tokens``, ``model``, ``config``, ``grid``, ``data``, ``versions``, as given to ``commit``.
    files : dict of str to FileEntry
    tensors : dict of str to TensorEntry
        By global name.
    view : FileEntry or None
        The file that shows other programs the tensors as one model; there may be none.
    digest : str
        Of the manifest itself.
    """

    version: int
    step: int
    header: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    view: FileEntry | None = None
    digest: str = ""

    @property
    def num_parameters(self) -> int:
        """Number of weights of the model."""
        return sum(tensor.size for tensor in self.tensors.values() if "weight" in tensor.kinds)

    @property
    def size_bytes(self) -> int:
        """Bytes of the ranks' files."""
        return sum(file.size_bytes for file in self.files.values())

    @cached_property
    def regions(self) -> dict[str, list["Region"]]:
        """What is hashed of each file, in its order: its metadata, and the pieces that have bytes."""
        regions: dict[str, list[Region]] = {
            file.name: [Region(item.offset, item.offset + item.size_bytes, item.digest, "") for item in file.metadata]
            for file in self.files.values()
        }
        for name, tensor in self.tensors.items():
            for kind, pieces in tensor.kinds.items():
                for piece in pieces:
                    if piece.start < piece.stop:
                        stop = piece.offset + (piece.stop - piece.start) * tensor.item_bytes
                        regions[piece.file].append(Region(piece.offset, stop, piece.digest, f"{kind} of {name}"))
        for items in regions.values():
            items.sort(key=lambda region: (region.start, region.stop))
        return regions


class Region(NamedTuple):
    """Bytes ``[start, stop)`` of a file, their digest, and which tensor's they are; empty for metadata."""

    start: int
    stop: int
    digest: str
    label: str
