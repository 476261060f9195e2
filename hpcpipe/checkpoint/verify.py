"""Whether a checkpoint is what was written: every byte of every file, and in words what is not."""

import os
from pathlib import Path

from hpcpipe.checkpoint.layout import MANIFEST, new_hash
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.table import Manifest
from hpcpipe.errors import DamagedError

_BLOCK_BYTES = 1 << 20
_NAMED_AT_MOST = 5


def verify(path: Path) -> list[str]:
    """Check a committed checkpoint: the manifest, and the size and hash of every file.

    Parameters
    ----------
    path : Path
        Directory of the checkpoint.

    Returns
    -------
    list of str
        The problems, each naming a file; empty when the checkpoint is sound. Unknown files are not a problem,
        nothing reads them; `unknown_files` lists them.
    """
    try:
        manifest = load_manifest(path)
    except DamagedError as error:
        return [str(error)]
    return [problem for name in manifest.files for problem in verify_file(path, manifest, name)]


def verify_file(path: Path, manifest: Manifest, name: str) -> list[str]:
    """Check one file of a checkpoint, so that ranks can share the work.

    A damaged file is never opened as HDF5, which could crash the process: the manifest knows where each
    tensor's bytes are.

    Parameters
    ----------
    path : Path
        Directory of the checkpoint.
    manifest : Manifest
        Its manifest.
    name : str
        A name in ``manifest.files``.

    Returns
    -------
    list of str
        The problems; for an altered file they name the tensors whose bytes differ.
    """
    file, entry = path / name, manifest.files[name]
    try:
        with file.open("rb", buffering=0) as stream:
            handle = stream.fileno()
            size = os.fstat(handle).st_size
            if size != entry.size_bytes:
                return [f"{file}: has {size:,} bytes, the manifest says {entry.size_bytes:,}"]
            found = _hash_range(handle, 0, size)
            if found == entry.blake2b:
                return []
            twin = next((other.name for other in manifest.files.values() if other.blake2b == found), None)
            if twin:
                return [f"{file}: holds what belongs in {twin}: the files were swapped or copied"]
            return [f"{file}: was altered after it was written (its hash differs); {_altered(handle, manifest, name)}"]
    except FileNotFoundError:
        return [f"{file}: is missing"]
    except OSError as error:
        return [f"{file}: cannot be read: {error.strerror}"]


def unknown_files(path: Path, manifest: Manifest) -> list[str]:
    """List what lies in a checkpoint's directory and is not part of it; nothing reads it.

    Returns
    -------
    list of str
        Names, sorted.
    """
    known = {MANIFEST, *manifest.files}
    return sorted(item.name for item in path.iterdir() if item.name not in known)


def _altered(handle: int, manifest: Manifest, name: str) -> str:
    """Name the tensors of an altered file whose bytes differ."""
    altered = [
        f"{kind} of {label}"
        for label, tensor in manifest.tensors.items()
        for kind, pieces in tensor.kinds.items()
        for piece in pieces
        if piece.file == name
        and _hash_range(handle, piece.offset, (piece.stop - piece.start) * tensor.item_bytes) != piece.blake2b
    ]
    if not altered:
        return "all its tensors are intact, the damage is in what HDF5 keeps around them"
    more = f" and {len(altered) - _NAMED_AT_MOST} more" if len(altered) > _NAMED_AT_MOST else ""
    return f"damaged: {', '.join(altered[:_NAMED_AT_MOST])}{more}"


def _hash_range(handle: int, start: int, num_bytes: int) -> str:
    """Hash a range of bytes of an open file."""
    digest = new_hash()
    block = memoryview(bytearray(min(_BLOCK_BYTES, num_bytes)))
    done = 0
    while done < num_bytes:
        count = os.preadv(handle, [block[: num_bytes - done]], start + done)
        if count == 0:
            break
        digest.update(block[:count])
        done += count
    return digest.hexdigest()
