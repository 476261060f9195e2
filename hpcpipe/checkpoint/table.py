"""The table of a manifest: files, tensors, pieces, and the check that it is possible."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np

from hpcpipe.checkpoint.digests import digest_key, is_digest, join
from hpcpipe.checkpoint.layout import DTYPES, VIEW, is_file_name, is_kind, is_tensor_name

_DIMENSIONS_AT_MOST = 32


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
    """

    version: int
    step: int
    header: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    view: FileEntry | None = None

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


def parse(document: dict[str, Any]) -> Manifest:
    """Turn the document of a manifest into dataclasses, trusting nothing in it.

    Parameters
    ----------
    document : dict
        What the JSON says, of a known version.

    Returns
    -------
    Manifest

    Raises
    ------
    ValueError, TypeError, KeyError
        Something is missing or impossible: a name that leads out of the directory, elements of a tensor that no
        piece holds or two hold, a piece that does not lie in its file.
    """
    version = document["version"]
    key = digest_key(version)
    files: dict[str, FileEntry] = {}
    for item in document["files"]:
        entry = _parse_file(item, key)
        if not is_file_name(entry.name) or entry.name in files:
            raise ValueError(f"names the file {entry.name!r}, which is not possible or comes twice")
        files[entry.name] = entry
    tensors = {name: _parse_tensor(name, item, files, key) for name, item in dict(document["tensors"]).items()}
    step, header = _count(document["step"]), document["header"]
    if not isinstance(header, dict) or header.get("step") != step:
        raise ValueError(f"has step {step}, but its header has another one")
    view = _parse_view(document["view"], key) if "view" in document else None
    manifest = Manifest(version, step, header, files, tensors, view)
    if version > 1:
        _check_regions(manifest)
    return manifest


def _parse_file(item: Any, key: str) -> FileEntry:
    # Version 1 has one digest of the whole file, and none of what lies around the tensors.
    metadata = () if key == digest_key(1) else item["metadata"]
    regions = tuple(RegionEntry(_count(part["offset"]), _count(part["bytes"]), _digest(part[key])) for part in metadata)
    return FileEntry(str(item["name"]), _count(item["bytes"]), _digest(item[key]), regions)


def _parse_view(item: Any, key: str) -> FileEntry:
    size, digest = _count(item["bytes"]), _digest(item[key])
    if item["name"] != VIEW:
        raise ValueError(f"names the view {item['name']!r:.80}, which is not possible")
    return FileEntry(VIEW, size, digest, (RegionEntry(0, size, digest),))


def _parse_tensor(name: str, item: Any, files: dict[str, FileEntry], key: str) -> TensorEntry:
    shape, dtype = tuple(_count(extent) for extent in item["shape"]), item["dtype"]
    if not is_tensor_name(name) or dtype not in DTYPES or len(shape) > _DIMENSIONS_AT_MOST:
        raise ValueError(
            f"names the tensor {name!r} of dtype {dtype!r:.80} and {len(shape)} dimensions, which is not possible"
        )
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
                _digest(piece[key]),
            )
            for piece in pieces
        )
    tensor = TensorEntry(shape, dtype, kinds)
    for kind, entries in kinds.items():
        _check_coverage(f"{kind} of {name}", tensor.size, entries)
        _check_ranges(f"{kind} of {name}", tensor.item_bytes, entries, files)
    return tensor


def _check_regions(manifest: Manifest) -> None:
    """See that pieces and metadata cover each file exactly once, and that its digest is that of their digests."""
    for name, entry in manifest.files.items():
        done = 0
        for region in manifest.regions[name]:
            if region.start != done:
                what = "are nowhere listed" if region.start > done else "are listed twice"
                raise ValueError(f"{name}: bytes from {min(region.start, done)} to {max(region.start, done)} {what}")
            done = region.stop
        if done != entry.size_bytes:
            raise ValueError(f"{name}: has {entry.size_bytes} bytes, of which {done} are listed")
        if join((bytes.fromhex(region.digest) for region in manifest.regions[name]), manifest.version).hex() != (
            entry.digest
        ):
            raise ValueError(f"{name}: its digest is not that of its regions")


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
    """Accept an integer that a file could have as a size."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"has {value!r:.80} where a count belongs")
    return value


def _digest(value: Any) -> str:
    """Accept a digest in hexadecimal."""
    if not is_digest(value):
        raise ValueError(f"has {value!r:.80} where a digest belongs")
    return str(value)
