"""Which checkpoints stay."""

from pathlib import Path

from hpcpipe.checkpoint.disk import move_to_trash, remove, sync_directory
from hpcpipe.checkpoint.layout import candidates
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.errors import DamagedError


def retain(root: Path, keep: int, newest: Path) -> list[Path]:
    """Remove old checkpoints. One rank calls it, after a commit.

    The checkpoint just written is always kept and counts first; then come older ones whose manifest is sound and whose
    files have their sizes. What is older than the oldest kept goes, damaged or not. A checkpoint of a later step is
    neither counted nor removed: this run did not write it, and went on without it for a reason.

    Parameters
    ----------
    root : Path
        The run's ``checkpoints`` directory.
    keep : int
        How many stay; 0: all.
    newest : Path
        The checkpoint just written.

    Returns
    -------
    list of Path
        The directories that are gone, newest first.

    Raises
    ------
    DiskError
        The file system refused; what was not yet removed is still there, whole or under a ``trash-`` name.
    """
    if keep <= 0:
        return []
    older = [path for path in candidates(root) if path.name < newest.name]
    complete = [path for path in older if _is_complete(path)]
    if len(complete) < keep:
        return []
    old = older[older.index(complete[keep - 2]) + 1 :] if keep > 1 else older
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
