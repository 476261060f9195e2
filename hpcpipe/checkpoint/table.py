"""The table of a manifest: files, tensors, pieces, and the check that it is possible."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from hpcpipe.checkpoint.layout import DTYPES, is_file_name, is_kind, is_tensor_name


@dataclass(frozen=True)
class FileEntry:
    """One file: its name, its size, and the BLAKE2b (32 bytes, hexadecimal) of its bytes."""

    name: str
    size_bytes: int
    blake2b: str


@dataclass(frozen=True)
class PieceEntry:
    """Elements ``[start, stop)`` of a tensor: the file, the byte where they begin, and their BLAKE2b."""

    file: str
    start: int
    stop: int
    offset: int
    blake2b: str


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
    step : int
        The number of optimizer updates made.
    header : dict
        ``step``, ``tokens``, ``model``, ``config``, ``grid``, ``data``, ``versions``, as given to ``commit``.
    files : dict of str to FileEntry
    tensors : dict of str to TensorEntry
        By global name.
    """

    step: int
    header: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @property
    def num_parameters(self) -> int:
        """Number of weights of the model."""
        return sum(tensor.size for tensor in self.tensors.values() if "weight" in tensor.kinds)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files without the manifest."""
        return sum(file.size_bytes for file in self.files.values())


def parse(document: dict[str, Any]) -> Manifest:
    """Turn the document of a manifest into dataclasses, trusting nothing in it.

    Parameters
    ----------
    document : dict
        What the JSON says.

    Returns
    -------
    Manifest

    Raises
    ------
    ValueError, TypeError, KeyError
        Something is missing or impossible: a name that leads out of the directory, elements of a tensor that no
        piece holds or two hold, a piece that does not lie in its file.
    """
    files: dict[str, FileEntry] = {}
    for item in document["files"]:
        entry = FileEntry(str(item["name"]), _count(item["bytes"]), str(item["blake2b"]))
        if not is_file_name(entry.name) or entry.name in files:
            raise ValueError(f"names the file {entry.name!r}, which is not possible or comes twice")
        files[entry.name] = entry
    tensors = {name: _parse_tensor(name, item, files) for name, item in dict(document["tensors"]).items()}
    step, header = _count(document["step"]), document["header"]
    if not isinstance(header, dict) or header.get("step") != step:
        raise ValueError(f"has step {step}, but its header has another one")
    return Manifest(step, header, files, tensors)


def _parse_tensor(name: str, item: Any, files: dict[str, FileEntry]) -> TensorEntry:
    shape, dtype = tuple(_count(extent) for extent in item["shape"]), item["dtype"]
    if not is_tensor_name(name) or dtype not in DTYPES:
        raise ValueError(f"names the tensor {name!r} of dtype {dtype!r}, which is not possible")
    kinds = {}
    for kind, pieces in dict(item["kinds"]).items():
        if not is_kind(kind):
            raise ValueError(f"names the kind {kind!r} of {name}, which is not possible")
        kinds[kind] = tuple(
            PieceEntry(
                str(piece["file"]),
                _count(piece["start"]),
                _count(piece["stop"]),
                _count(piece["offset"]),
                str(piece["blake2b"]),
            )
            for piece in pieces
        )
    tensor = TensorEntry(shape, dtype, kinds)
    for kind, entries in kinds.items():
        _check_coverage(f"{kind} of {name}", tensor.size, entries)
        _check_ranges(f"{kind} of {name}", tensor.item_bytes, entries, files)
    return tensor


def _check_coverage(label: str, size: int, pieces: Iterable[PieceEntry]) -> None:
    """See that the pieces, in ascending order, hold every element exactly once."""
    done = 0
    for number, piece in enumerate(pieces):
        if piece.start > done:
            raise ValueError(f"{label}: no file holds the elements [{done}, {piece.start}) of its {size}")
        if piece.start < done or (number and piece.start == piece.stop):
            raise ValueError(f"{label}: elements from {piece.start} on are held twice, also in {piece.file}")
        if piece.stop < piece.start:
            raise ValueError(f"{label}: {piece.file} holds elements [{piece.start}, {piece.stop})")
        done = piece.stop
    if done != size:
        raise ValueError(f"{label}: the files hold {done} elements of its {size}")


def _check_ranges(label: str, item_bytes: int, pieces: Iterable[PieceEntry], files: dict[str, FileEntry]) -> None:
    """See that each piece lies within a file of the checkpoint."""
    for piece in pieces:
        file = files.get(piece.file)
        if file is None or piece.offset + (piece.stop - piece.start) * item_bytes > file.size_bytes:
            raise ValueError(f"{label}: elements [{piece.start}, {piece.stop}) do not lie within {piece.file}")


def _count(value: Any) -> int:
    """Accept an integer that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"has {value!r} where a count belongs")
    return value
