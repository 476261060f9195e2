"""The writer of checkpoints of format version 1 as it was, so that they can be read for ever. Do not change it."""

import json
from hashlib import blake2b
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import h5py


def write_version1(root: Path, header: dict[str, Any], pieces_per_writer: list[list[Any]]) -> Path:
    """Write a checkpoint of version 1 of the pieces that each rank holds; return its directory."""
    path = root / f"step-{header['step']:08d}"
    path.mkdir(parents=True)
    files, tensors = [], {}
    for writer, pieces in enumerate(pieces_per_writer):
        name = f"rank-{writer:04d}.h5"
        data, found = _image(header["step"], pieces)
        (path / name).write_bytes(data)
        files.append({"name": name, "bytes": len(data), "blake2b": _digest(data)})
        for tensor, entry in found.items():
            known = tensors.setdefault(tensor, {"shape": entry["shape"], "dtype": entry["dtype"], "kinds": {}})
            for kind, piece in entry["kinds"].items():
                every = known["kinds"].setdefault(kind, [])
                every.append({"file": name, **piece})
                every.sort(key=lambda piece: (piece["start"], piece["stop"]))
    document = {
        "format": "hpcpipe-checkpoint",
        "version": 1,
        "step": header["step"],
        "header": header,
        "files": files,
        "tensors": tensors,
    }
    write_manifest(path, document)
    return path


def write_manifest(path: Path, document: dict[str, Any]) -> None:
    """Write a manifest of version 1 with the right digest, whatever it says."""
    content = json.loads(json.dumps({key: value for key, value in document.items() if key != "blake2b"}))
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    manifest = {**content, "blake2b": _digest(text)}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=32).hexdigest()


def _image(step: int, pieces: list[Any]) -> tuple[bytes, dict[str, Any]]:
    buffer = BytesIO()
    tensors: dict[str, Any] = {}
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        file.attrs.update({"format": "hpcpipe-checkpoint", "version": 1, "step": step})
        for piece in pieces:
            is_whole = piece.start == 0 and piece.stop == prod(piece.shape)
            if piece.start == piece.stop and not is_whole:
                continue
            data = piece.data.reshape(piece.shape if is_whole else -1)
            dataset = file.create_dataset(f"{piece.kind}/{piece.name}", data=data, track_times=False)
            if not is_whole:
                dataset.attrs.update({"shape": piece.shape, "start": piece.start, "stop": piece.stop})
            offset = int(dataset.id.get_offset() or 0)
            entry = tensors.setdefault(
                piece.name, {"shape": list(piece.shape), "dtype": piece.data.dtype.name, "kinds": {}}
            )
            digest = _digest(piece.data.tobytes())
            entry["kinds"][piece.kind] = {
                "start": piece.start,
                "stop": piece.stop,
                "offset": offset,
                "blake2b": digest,
            }
    return buffer.getvalue(), tensors
