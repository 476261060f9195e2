"""Whether a checkpoint is what was written: every byte of every file, and in words what is not."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hpcpipe.checkpoint.files import digest_range, new_block, open_regular
from hpcpipe.checkpoint.layout import MANIFEST, VIEW
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.table import FileEntry, Manifest, Region
from hpcpipe.errors import DamagedError

_NAMED_AT_MOST = 5
_Digest = Callable[[int, int], str]


def verify(path: Path) -> list[str]:
    """Check a committed checkpoint: the manifest, and every byte of every file and of the view.

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
    problems = [problem for name in manifest.files for problem in verify_file(path, manifest, name)]
    return problems + verify_view(path, manifest)


def verify_file(path: Path, manifest: Manifest, name: str) -> list[str]:
    """Check one file of a checkpoint, so that ranks can share the work; each byte is read and hashed once.

    A file is never opened as HDF5, which could crash the process: the manifest knows where each tensor's bytes are.

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
    return _verify(path / name, manifest.files[name], manifest, manifest.regions[name])


def verify_metadata(path: Path, manifest: Manifest, name: str) -> list[str]:
    """Check what a `Reader` does not of one file: its size, and what HDF5 keeps around the tensors.

    Parameters and return value as of `verify_file`. Version 1 has no digests of this part alone: there the whole file
    is read.
    """
    regions = [region for region in manifest.regions[name] if not region.label]
    return _verify(path / name, manifest.files[name], manifest, regions)


def verify_view(path: Path, manifest: Manifest) -> list[str]:
    """Check the file that shows other programs the tensors as one model; a restart can do without it.

    Parameters and return value as of `verify`, whose part it is.
    """
    if manifest.view is None:
        return []
    region = Region(0, manifest.view.size_bytes, manifest.view.digest, "")
    return _verify(path / VIEW, manifest.view, manifest, [region])


def unknown_files(path: Path, manifest: Manifest) -> list[str]:
    """List what lies in a checkpoint's directory and is not part of it; nothing reads it.

    Returns
    -------
    list of str
        Names, sorted.
    """
    known = {MANIFEST, VIEW, *manifest.files} if manifest.view else {MANIFEST, *manifest.files}
    return sorted(item.name for item in path.iterdir() if item.name not in known)


def _verify(file: Path, entry: FileEntry, manifest: Manifest, regions: Sequence[Region]) -> list[str]:
    """Check the size of a file, and some of its regions; for version 1 the whole."""
    try:
        handle = open_regular(file)
        try:
            size = os.fstat(handle).st_size
            if size != entry.size_bytes:
                return [f"{file}: has {size:,} bytes, the manifest says {entry.size_bytes:,}"]
            block = new_block(size)

            def digest(start: int, stop: int) -> str:
                return digest_range(handle, start, stop - start, manifest.version, block)

            return [f"{file}: {problem}" for problem in _alterations(manifest, entry, regions, digest)]
        finally:
            os.close(handle)
    except FileNotFoundError:
        return [f"{file}: is missing"]
    except OSError as error:
        return [f"{file}: cannot be read: {error.strerror}"]


def _alterations(manifest: Manifest, entry: FileEntry, regions: Sequence[Region], digest: _Digest) -> list[str]:
    """Say what of a file of the right size is not as it was written."""
    whole = Region(0, entry.size_bytes, entry.digest, "")
    checked = regions if manifest.version > 1 else [whole]
    altered = [region.label for region in checked if digest(region.start, region.stop) != region.digest]
    if not altered:
        return []
    if entry.name == VIEW:
        return ["was altered after it was written (its hash differs); only other programs read it"]
    twin = _twin(manifest, entry, digest)
    if twin:
        return [f"holds what belongs in {twin}: the files were swapped or copied"]
    if manifest.version == 1:
        pieces = manifest.regions[entry.name]
        altered = [region.label for region in pieces if digest(region.start, region.stop) != region.digest]
    return [f"was altered after it was written (its hash differs); {_describe([label for label in altered if label])}"]


def _twin(manifest: Manifest, entry: FileEntry, digest: _Digest) -> str | None:
    """Find the file of the checkpoint that a file's content belongs to."""
    for other in manifest.files.values():
        if other.name != entry.name and other.size_bytes == entry.size_bytes:
            whole = Region(0, other.size_bytes, other.digest, "")
            regions = manifest.regions[other.name] if manifest.version > 1 else [whole]
            if all(digest(region.start, region.stop) == region.digest for region in regions):
                return other.name
    return None


def _describe(altered: Sequence[str]) -> str:
    """Name the tensors of an altered file whose bytes differ."""
    if not altered:
        return "all its tensors are intact, the damage is in what HDF5 keeps around them"
    more = f" and {len(altered) - _NAMED_AT_MOST} more" if len(altered) > _NAMED_AT_MOST else ""
    return f"damaged: {', '.join(altered[:_NAMED_AT_MOST])}{more}"
