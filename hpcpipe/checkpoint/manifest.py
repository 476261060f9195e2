"""The manifest: the file that commits a checkpoint and says what it holds, where, and with which hashes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcpipe.checkpoint.digests import digest_key, digest_of
from hpcpipe.checkpoint.files import open_regular, read_range
from hpcpipe.checkpoint.layout import FORMAT, MANIFEST, VERSION, VIEW, step_of
from hpcpipe.checkpoint.parse import parse
from hpcpipe.checkpoint.table import Manifest
from hpcpipe.errors import DamagedError

_BYTES_AT_MOST = 256 << 20


def assemble(header: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the records of all ranks to the document that the manifest file holds.

    Parameters
    ----------
    header : dict
        JSON-able, with an integer ``step``.
    records : sequence of dict
        What `hpcpipe.checkpoint.image.Image.record` says of each rank's file.

    Returns
    -------
    dict
        JSON-able, the digest of all the rest under ``blake3``.

    Raises
    ------
    DamagedError
        A record is of another step, a file comes twice, two ranks disagree on a tensor, or a tensor's elements
        are not held exactly once.
    """
    step = int(header["step"])
    files: list[dict[str, Any]] = []
    tensors: dict[str, Any] = {}
    for record in sorted(records, key=lambda record: str(record["file"]["name"])):
        name = record["file"]["name"]
        if record["step"] != step:
            raise DamagedError(f"{name} is of step {record['step']}, the checkpoint of step {step}; not committed")
        files.append(dict(record["file"]))
        for tensor, entry in record["tensors"].items():
            _merge(tensors, tensor, entry, name)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "header": header,
        "files": files,
        "tensors": tensors,
    }
    # What is written is what the JSON says: tuples become lists here, not at the next start.
    document = json.loads(json.dumps(document, allow_nan=False))
    try:
        parse(document)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"checkpoint of step {step}: {error}; not committed") from error
    return {**document, digest_key(): _digest(document, VERSION)}


def enter_view(document: dict[str, Any], view: bytes) -> dict[str, Any]:
    """Return the document of `assemble` with an entry for the file that was made from it."""
    key = digest_key()
    content = {name: value for name, value in document.items() if name != key}
    content["view"] = {"name": VIEW, "bytes": len(view), key: digest_of(view).hex()}
    return {**content, key: _digest(content, VERSION)}


def render(document: dict[str, Any]) -> bytes:
    """Write the one text of a document: sorted keys, one per line.

    Raises
    ------
    DamagedError
        It would be larger than what `load_manifest` reads.
    """
    text = (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
    if len(text) > _BYTES_AT_MOST:
        raise DamagedError(f"a manifest of {len(text):,} bytes could not be read again, at most {_BYTES_AT_MOST:,} can")
    return text


def load_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Parameters
    ----------
    path : Path
        Directory of a committed checkpoint.

    Returns
    -------
    Manifest
        Checked: names cannot lead out of the directory, every tensor is covered once, every piece lies in its file.

    Raises
    ------
    DamagedError
        The manifest is missing, unreadable, altered, of an unknown version, or of another step.
    """
    file = path / MANIFEST
    raw = _read(file)
    try:
        document = json.loads(raw)
        _check_version(document)
        _check_digest(document, raw)
        manifest = parse(document)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError(f"{file}: {_describe(error)}") from error
    named = step_of(path.name)
    if named is not None and named != manifest.step:
        raise DamagedError(f"{file}: is of step {manifest.step}, but lies in {path.name}")
    return manifest


def _read(file: Path) -> bytes:
    """Read the text of a manifest, if it has a size that one can have."""
    try:
        handle = open_regular(file)
        try:
            size = os.fstat(handle).st_size
            if size > _BYTES_AT_MOST:
                raise DamagedError(f"{file}: has {size:,} bytes, a manifest at most {_BYTES_AT_MOST:,}")
            raw = bytearray(size)
            return bytes(raw[: read_range(handle, 0, memoryview(raw))])
        finally:
            os.close(handle)
    except FileNotFoundError as error:
        raise DamagedError(f"{file}: is missing: the checkpoint was never finished") from error
    except OSError as error:
        raise DamagedError(f"{file}: cannot be read: {error.strerror}") from error


def _check_version(document: Any) -> None:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"is not the manifest of a checkpoint (it has no format {FORMAT!r})")
    version = document.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"has version {version!r:.80}, this hpcpipe reads versions 1 to {VERSION}: a checkpoint is read by the "
            "hpcpipe that wrote it and by later ones; install one that knows this version"
        )


def _check_digest(document: dict[str, Any], raw: bytes) -> None:
    key = digest_key(document["version"])
    content = {name: value for name, value in document.items() if name != key}
    # The text is compared too: 1e5 and 1E5 are the same number, but not the same file.
    if document.get(key) != _digest(content, document["version"]) or render(document) != raw:
        raise ValueError("was altered after it was written (its digest differs)")


def _digest(content: dict[str, Any], version: int) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return digest_of(text.encode("ascii"), version).hex()


def _describe(error: Exception) -> str:
    """Say in words what a parser's exception means."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"is not JSON: {error}"
    if isinstance(error, KeyError):
        return f"lacks {error}"
    return str(error)


def _merge(tensors: dict[str, Any], name: str, entry: dict[str, Any], file: str) -> None:
    """Add one file's pieces of one tensor."""
    known = tensors.setdefault(name, {"shape": entry["shape"], "dtype": entry["dtype"], "kinds": {}})
    if list(known["shape"]) != list(entry["shape"]) or known["dtype"] != entry["dtype"]:
        raise DamagedError(
            f"{name}: {entry['dtype']} of shape {list(entry['shape'])} in {file}, {known['dtype']} of shape "
            f"{list(known['shape'])} in another file; not committed"
        )
    for kind, pieces in entry["kinds"].items():
        every = known["kinds"].setdefault(kind, [])
        every.extend({"file": file, **piece} for piece in pieces)
        every.sort(key=lambda piece: (piece["start"], piece["stop"]))
