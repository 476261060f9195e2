"""Which checkpoints stay."""

import math
from functools import lru_cache
from pathlib import Path

from hpcpipe.checkpoint.disk import move_to_trash, remove, sync_directory
from hpcpipe.checkpoint.layout import MANIFEST, candidates, step_of
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.errors import DamagedError, DiskError


def retain(root: Path, newest: Path, *, keep: int, keep_every: int = 0, keep_best: bool = False) -> list[Path]:
    """Remove old checkpoints. One process calls it, after a commit.

    What stays:

    - the newest `keep` good ones, and whatever is newer than the oldest of them; a good one has a sound manifest, and
      files of the sizes that it says;
    - every step that is a multiple of `keep_every`;
    - the good one with the lowest held-out loss, the newest of equal ones; the header's ``val_loss`` says it;
    - every later step than `newest`: this run did not write it, and went on without it for a reason.

    So the last good one stays whatever the settings. While there are no more good ones than `keep`, nothing goes.

    Parameters
    ----------
    root : Path
        The run's ``checkpoints`` directory.
    newest : Path
        The checkpoint just written.
    keep : int
        How many of the newest stay; 0: all.
    keep_every : int
        Steps; 0: none stays for its number.
    keep_best : bool
        Whether the best one stays.

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
    present = {path: step_of(path.name) or 0 for path in candidates(root)}
    last = step_of(newest.name) or 0
    paths = [path for path, step in present.items() if step <= last]
    good = [path for path in paths if _is_good(path)]
    if len(good) <= keep:
        return []
    best = min(good, key=_loss) if keep_best else None
    old = [
        path
        for path in paths[paths.index(good[keep - 1]) + 1 :]
        if not (keep_every > 0 and present[path] % keep_every == 0)
        and not (path == best and math.isfinite(_loss(path)))
    ]
    trash = [move_to_trash(path) for path in old]
    if trash:
        sync_directory(root)
    for path in trash:
        remove(path)
    return old


def set_aside(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, so that no start takes them: the run has gone back behind them.

    Parameters
    ----------
    root : Path
        The run's ``checkpoints`` directory.
    step : int
        The latest step that stays.

    Returns
    -------
    list of Path
        Where they are now, ``step-00000100.rewound`` each.

    Raises
    ------
    DiskError
        The file system refused.
    """
    moved = []
    try:
        for path in candidates(root):
            if (step_of(path.name) or 0) > step:
                names = (f"{path.name}.rewound{f'-{count}' if count else ''}" for count in range(1000))
                target = next(root / name for name in names if not (root / name).exists())
                moved.append(path.rename(target))
        if moved:
            sync_directory(root)
    except OSError as error:
        raise DiskError(f"{root}: checkpoints after step {step} could not be renamed ({error.strerror})") from error
    return moved


def _is_good(path: Path) -> bool:
    """Check the manifest and the sizes, without reading the files."""
    try:
        sizes, _ = _read(path)
        return all((path / name).lstat().st_size == size for name, size in sizes)
    except (DamagedError, OSError):
        return False


def _loss(path: Path) -> float:
    """Return the held-out loss of a good checkpoint; infinite if it was not evaluated."""
    return _read(path)[1]


def _read(path: Path) -> tuple[tuple[tuple[str, int], ...], float]:
    """Return the names and sizes of a checkpoint's files, and its held-out loss."""
    state = (path / MANIFEST).lstat()
    return _read_once(path, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _read_once(path: Path, *_state: int) -> tuple[tuple[tuple[str, int], ...], float]:
    """Read a manifest again only if the file is another one: those that stay for ever become many."""
    manifest = load_manifest(path)
    loss = manifest.header.get("val_loss")
    is_number = isinstance(loss, int | float) and not isinstance(loss, bool)
    sizes = tuple((file.name, file.size_bytes) for file in manifest.files.values())
    return sizes, float(loss) if is_number and loss is not None else math.inf
