"""Faults of files: what a disk, a file system, a copy or a person may do to a committed checkpoint."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from hpcpipe.checkpoint.manifest import load_manifest

MANIFEST, VIEW = "manifest.json", "view.h5"
Damage = Callable[[Path, random.Random], Path | None]


def flip_tensor(path: Path, draw: random.Random) -> Path:
    """Flip a bit of a tensor."""
    return _flip_region(path, draw, of_tensor=True)


def flip_hdf5_metadata(path: Path, draw: random.Random) -> Path:
    """Flip a bit of what HDF5 keeps around the tensors."""
    return _flip_region(path, draw, of_tensor=False)


def flip_manifest(path: Path, draw: random.Random) -> Path:
    """Flip a bit of the manifest."""
    return _flip(path / MANIFEST, draw, draw.randrange((path / MANIFEST).stat().st_size))


def flip_view(path: Path, draw: random.Random) -> Path | None:
    """Flip a bit of the view."""
    file = path / VIEW
    return _flip(file, draw, draw.randrange(file.stat().st_size)) if file.exists() else None


def truncate(path: Path, draw: random.Random) -> Path:
    """Cut a file off at a random byte."""
    file = _any(path, draw)
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])
    return file


def extend(path: Path, draw: random.Random) -> Path:
    """Put bytes at the end of a file."""
    file = _any(path, draw)
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.choice((1, 100, 4096))))
    return file


def lose_sector(path: Path, draw: random.Random) -> Path | None:
    """Let a sector of a file read as zero."""
    file = _any(path, draw)
    size = draw.choice((512, 4096))
    start = draw.randrange(file.stat().st_size) // size * size
    data = file.read_bytes()
    return _replace(file, data[:start] + bytes(len(data[start : start + size])) + data[start + size :])


def keep_old_sector(path: Path, draw: random.Random) -> Path | None:
    """Leave a sector of a file as it is in another checkpoint: a write that was lost."""
    other = _other(path, draw)
    file = _any(path, draw)
    if other is None or not (other / file.name).exists():
        return None
    size = draw.choice((512, 4096))
    start = draw.randrange(file.stat().st_size) // size * size
    data, old = file.read_bytes(), (other / file.name).read_bytes()
    return _replace(
        file,
        data[:start] + old[start : start + size].ljust(len(data[start : start + size]), b"\0") + data[start + size :],
    )


def fill_with_garbage(path: Path, draw: random.Random) -> Path:
    """Replace a file by as many random bytes."""
    file = _any(path, draw)
    file.write_bytes(draw.randbytes(file.stat().st_size))
    return file


def lose_file(path: Path, draw: random.Random) -> Path:
    """Remove a file."""
    file = _any(path, draw)
    file.unlink()
    return file


def swap_files(path: Path, draw: random.Random) -> Path | None:
    """Swap the files of two ranks."""
    a, b = draw.sample(sorted(path.glob("rank-*.h5")), 2)
    first, second = a.read_bytes(), b.read_bytes()
    b.write_bytes(first)
    return _replace(a, second)


def take_file_of_another_step(path: Path, draw: random.Random) -> Path | None:
    """Replace a file by that of another checkpoint."""
    other = _other(path, draw)
    file = _any(path, draw)
    return _replace(file, (other / file.name).read_bytes()) if other and (other / file.name).exists() else None


def take_all_of_another_step(path: Path, draw: random.Random) -> Path | None:
    """Replace the whole checkpoint by another one, under its own name."""
    other = _other(path, draw)
    if other is None:
        return None
    shutil.rmtree(path)
    shutil.copytree(other, path)
    return path / MANIFEST


def put_directory(path: Path, draw: random.Random) -> Path:
    """Put a directory where a file was."""
    file = _any(path, draw)
    file.unlink()
    file.mkdir()
    return file


KINDS: dict[str, Damage] = {
    "flipped bit in a tensor": flip_tensor,
    "flipped bit in HDF5's metadata": flip_hdf5_metadata,
    "flipped bit in the manifest": flip_manifest,
    "flipped bit in the view": flip_view,
    "truncated file": truncate,
    "file too long": extend,
    "sector lost": lose_sector,
    "sector of another step": keep_old_sector,
    "garbage in place of a file": fill_with_garbage,
    "missing file": lose_file,
    "swapped files": swap_files,
    "file of another step": take_file_of_another_step,
    "all files of another step": take_all_of_another_step,
    "directory in place of a file": put_directory,
}
"""What each kind does; a function returns the file that it damaged, or None where there was nothing to damage."""


def _any(path: Path, draw: random.Random) -> Path:
    """Choose a file of a checkpoint, a rank's more often than the others."""
    files = sorted(path.iterdir())
    return draw.choice([*files, *(file for file in files if file.name.startswith("rank"))])


def _other(path: Path, draw: random.Random) -> Path | None:
    others = sorted(other for other in path.parent.glob("step-*") if other != path)
    return draw.choice(others) if others else None


def _flip_region(path: Path, draw: random.Random, *, of_tensor: bool) -> Path:
    manifest = load_manifest(path)
    tensors = {name: [r for r in regions if r.label] for name, regions in manifest.regions.items()}
    name = draw.choice([name for name, regions in tensors.items() if regions])
    if of_tensor:
        region = draw.choice(tensors[name])
        return _flip(path / name, draw, draw.randrange(region.start, region.stop))
    held = {byte for region in tensors[name] for byte in range(region.start, region.stop)}
    return _flip(path / name, draw, draw.choice(sorted(set(range(manifest.files[name].size_bytes)) - held)))


def _flip(file: Path, draw: random.Random, position: int) -> Path:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return file


def _replace(file: Path, data: bytes) -> Path | None:
    """Write a file, if it then is another one."""
    if file.read_bytes() == data:
        return None
    file.write_bytes(data)
    return file
