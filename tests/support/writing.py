"""Checkpoints written by the test's own process, file by file, with the parts that writer processes use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcpipe.checkpoint import disk
from hpcpipe.checkpoint.digests import digest_of
from hpcpipe.checkpoint.image import Image
from hpcpipe.checkpoint.layout import Piece, file_name, leftovers, partial_name


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
