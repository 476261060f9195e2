"""The commit: a checkpoint that is either whole or not there."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcpipe.checkpoint import disk, view
from hpcpipe.checkpoint.layout import MANIFEST, VIEW, step_name
from hpcpipe.checkpoint.manifest import assemble, enter_view, render
from hpcpipe.cluster.holder import fence_of
from hpcpipe.errors import DamagedError, InUseError

_REMADE_S = 3.0
_NAP_S = 0.05


def join_partial(partial: Path) -> None:
    """Make the directory that a checkpoint is written into, unless another rank has.

    Parameters
    ----------
    partial : Path
        Its name has a token that only the ranks of this launch know.

    Raises
    ------
    DiskError
        The file system refused.
    """
    with disk.disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)


def commit(
    partial: Path, header: dict[str, Any], records: Sequence[dict[str, Any]], lock: dict[str, str] | None = None
) -> Path:
    """Make the checkpoint valid. One rank calls it, after every rank's file is written.

    Parameters
    ----------
    partial : Path
        The directory that the files were written into.
    header : dict
        JSON-able: ``step``, ``tokens``, ``model``, ``config``, ``grid``, ``data``, ``versions``.
    records : sequence of dict
        What `hpcpipe.checkpoint.image.Image.record` says of each file.
    lock : dict, optional
        ``path`` of the run's lock and ``fence``, the token that it must have: who has lost the lock commits nothing.

    Returns
    -------
    Path
        The committed directory. One of that name that was there before is gone.

    Raises
    ------
    DamagedError
        The files do not hold every element of every tensor exactly once, are of another step, or are not there
        with their full size. Nothing is committed.
    DiskError
        The file system refused. Nothing is committed, unless only the last sync failed.
    InUseError
        Another run has taken the lock over. Nothing is committed.
    """
    document = assemble(header, records)
    final = partial.with_name(step_name(document["step"]))
    if not partial.name.startswith(f"{final.name}.") or partial.suffix != ".partial":
        raise DamagedError(f"{partial}: the header is of step {document['step']}; the checkpoint is not committed")
    _check_sizes(partial, document["files"])
    content = view.build(document)
    disk.write_new(partial / VIEW, [memoryview(content)])
    disk.write_new(partial / MANIFEST, [memoryview(render(enter_view(document, content)))])
    disk.sync_directory(partial)
    if lock is not None:
        _require_lock(lock)
    trash = disk.move_to_trash(final) if os.path.lexists(final) else None
    disk.rename(partial, final)
    disk.sync_directory(final.parent)
    if trash:
        disk.remove(trash)
    return final


def abandon(partial: Path) -> None:
    """Remove a checkpoint that was begun and is not to be committed. One rank calls it.

    Raises
    ------
    DiskError
        The file system refused.
    """
    disk.remove(partial)


def _require_lock(lock: dict[str, str]) -> None:
    """Refuse to commit what another run would take for its own."""
    path = Path(lock["path"])
    deadline = time.monotonic() + _REMADE_S
    # The run makes a lock that somebody removed again when it next looks.
    while not (found := fence_of(path)) and time.monotonic() < deadline:
        time.sleep(_NAP_S)
    if found != lock["fence"]:
        raise InUseError(
            f"{path}: another run has taken this run directory over: nothing more is written to it; see that one job"
            " runs in a directory, or choose another run.name"
        )


def _check_sizes(partial: Path, files: Sequence[dict[str, Any]]) -> None:
    """See that the committing rank finds every file with its full size."""
    for entry in files:
        path = partial / entry["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is not there" if size is None else f"has {size:,} bytes"
            raise DamagedError(
                f"{path}: {found}, but its rank wrote {entry['bytes']:,}: all ranks must see the same run.dir; "
                "the checkpoint is not committed"
            )
