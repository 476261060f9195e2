"""Which checkpoints stay."""

from pathlib import Path

from hpcpipe.checkpoint.disk import move_to_trash, remove, sync_directory
from hpcpipe.checkpoint.layout import candidates
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.errors import DamagedError


def retain(root: Path, keep: int) -> list[Path]:
    """Remove old checkpoints. One rank calls it, after a commit.

    Only a checkpoint whose manifest is sound and whose files have their sizes counts as kept, so that a damaged
    one never pushes out a good one. What is older than the oldest kept goes, damaged or not.

    Parameters
    ----------
    root : Path
        The run's ``checkpoints`` directory.
    keep : int
        How many stay; 0: all.

    Returns
    -------
    list of Path
        The directories that are gone, newest first.

    Raises
    ------
    DiskError
        The file system refused; what was not yet removed is still there, whole or under a ``trash-`` name.
    """
    every = candidates(root)
    complete = [path for path in every if _is_complete(path)] if keep > 0 else []
    if len(complete) <= keep or keep <= 0:
        return []
    old = every[every.index(complete[keep - 1]) + 1 :]
    trash = [move_to_trash(path) for path in old]
    sync_directory(root)
    for path in trash:
        remove(path)
    return old


def _is_complete(path: Path) -> bool:
    """Check the manifest and the sizes, without reading the files."""
    try:
        files = load_manifest(path).files.values()
        return all((path / file.name).stat().st_size == file.size_bytes for file in files)
    except (DamagedError, OSError):
        return False
