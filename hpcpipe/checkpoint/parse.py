"""From the JSON of a manifest to its table, and the check that what it says is possible."""

from collections.abc import Iterable
from typing import Any

from hpcpipe.checkpoint.digests import digest_key, is_digest, join
from hpcpipe.checkpoint.layout import DTYPES, VIEW, is_file_name, is_kind, is_tensor_name
from hpcpipe.checkpoint.table import FileEntry, Manifest, PieceEntry, RegionEntry, TensorEntry

_DIMENSIONS_AT_MOST = 32
_LEVELS_AT_MOST = 32


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
            raise ValueError(f"names the file {entry.name!r:.80}, which is not possible or comes twice")
        files[entry.name] = entry
    tensors = {name: _parse_tensor(name, item, files, key) for name, item in dict(document["tensors"]).items()}
    step, header = _count(document["step"]), document["header"]
    if not isinstance(header, dict) or header.get("step") != step:
        raise ValueError(f"has step {step}, but its header has another one")
    _check_depth(header)
    view = _parse_view(document["view"], key) if "view" in document else None
    manifest = Manifest(version, step, header, files, tensors, view, str(document.get(key, "")))
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
            f"names the tensor {name!r:.80} of dtype {dtype!r:.80} and {len(shape)} dimensions, which is not possible"
        )
    kinds = {}
    for kind, pieces in dict(item["kinds"]).items():
        if not is_kind(kind):
            raise ValueError(f"names the kind {kind!r:.80} of {name}, which is not possible")
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


def _check_depth(header: dict[str, Any]) -> None:
    """Refuse a header that functions could not walk through."""
    level: list[Any] = [header]
    for _ in range(_LEVELS_AT_MOST):
        level = [
            value
            for item in level
            for value in (item.values() if isinstance(item, dict) else item)
            if isinstance(value, dict | list)
        ]
    if level:
        raise ValueError(f"has a header of more than {_LEVELS_AT_MOST} levels")


def _check_coverage(label: str, size: int, pieces: Iterable[PieceEntry]) -> None:
    """See that the pieces, in ascending order, hold every element exactly once."""
    done = 0
    for number, piece in enumerate(pieces):
        if piece.start > done:
            raise ValueError(f"{label}: no file holds the elements [{done}, {piece.start}) of its {size}")
        if piece.start < done or (number and piece.start == piece.stop):
            raise ValueError(f"{label}: elements from {piece.start} on are held twice, also in {piece.file!r:.80}")
        if piece.stop < piece.start:
            raise ValueError(f"{label}: {piece.file!r:.80} holds elements [{piece.start}, {piece.stop})")
        done = piece.stop
    if done != size:
        raise ValueError(f"{label}: the files hold {done} elements of its {size}")


def _check_ranges(label: str, item_bytes: int, pieces: Iterable[PieceEntry], files: dict[str, FileEntry]) -> None:
    """See that each piece lies within a file of the checkpoint."""
    for piece in pieces:
        file = files.get(piece.file)
        if file is None or piece.offset + (piece.stop - piece.start) * item_bytes > file.size_bytes:
            raise ValueError(f"{label}: elements [{piece.start}, {piece.stop}) do not lie within {piece.file!r:.80}")


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
