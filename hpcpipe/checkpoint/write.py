"""From begin to commit: a checkpoint that is either whole or not there."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcpipe.checkpoint import disk, view
from hpcpipe.checkpoint.digests import digest_of
from hpcpipe.checkpoint.image import Image
from hpcpipe.checkpoint.layout import MANIFEST, VIEW, Piece, file_name, leftovers, partial_name, step_name
from hpcpipe.checkpoint.manifest import assemble, enter_view, render
from hpcpipe.cluster.holder import fence_of
from hpcpipe.errors import DamagedError, InUseError

_REMADE_S = 3.0
_NAP_S = 0.05


def begin(root: Path, step: int) -> Path:
    """Make the directory that a checkpoint is written into. One rank calls it, the others wait.

    Leftovers of interrupted writings and removals below `root` are removed first: no other writing may be
    under way.

    Parameters
    ----------
    root : Path
        The run's ``checkpoints`` directory; made when it is missing.
    step : int
        The number of optimizer updates made.

    Returns
    -------
    Path
        ``root/step-XXXXXXXX.partial``, empty.

    Raises
    ------
    DiskError
        The file system refused.
    """
    for path in list(leftovers(root)):
        disk.remove(path)
    partial = root / partial_name(step)
    with disk.disk_errors(partial):
        root.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    return partial


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


def write_file(partial: Path, writer: int, step: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write one rank's file. Every writing rank calls it once, in any order.

    Parameters
    ----------
    partial : Path
        What ``begin`` returned.
    writer : int
        Number of the writing rank; names the file.
    step : int
        The number of optimizer updates made.
    pieces : sequence of Piece
        What this rank writes, at most one piece per kind and tensor; only read, not copied.

    Returns
    -------
    dict
        The file's record for ``commit``; JSON-able, so that it can be sent to the committing rank.

    Raises
    ------
    DiskError
        The file system refused; call ``abandon``.
    ValueError
        Two pieces of the same kind of the same tensor, or of different shape or dtype.
    """
    name = file_name(writer)
    image = Image([piece.spec for piece in pieces])
    regions = image.regions(step, [piece.buffer for piece in pieces])
    disk.write_new(partial / name, [region.buffer for region in regions])
    return image.record(name, step, regions, [digest_of(region.buffer) for region in regions])


def commit(
    partial: Path, header: dict[str, Any], records: Sequence[dict[str, Any]], lock: dict[str, str] | None = None
) -> Path:
    """Make the checkpoint valid. One rank calls it, after every rank's ``write_file`` has returned.

    Parameters
    ----------
    partial : Path
        What ``begin`` returned.
    header : dict
        JSON-able: ``step``, ``tokens``, ``model``, ``config``, ``grid``, ``data``, ``versions``.
    records : sequence of dict
        What each ``write_file`` returned.
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
