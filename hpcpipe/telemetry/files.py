"""Small text files that appear whole or not at all, and logs of one JSON object per line."""

import json
import os
import time
from pathlib import Path
from typing import Any

from hpcpipe.errors import DiskError


def write_whole(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises
    ------
    DiskError
        If the file system refuses; the earlier file is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DiskError(
            f"{path} could not be written ({error.strerror}): free space or choose another run.dir"
        ) from error


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object to a log.

    Floats are written with the fewest digits that read back to the same bits.

    Raises
    ------
    DiskError
        If the file system refuses.
    """
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise DiskError(
            f"{path} could not be written ({error.strerror}): free space or choose another run.dir"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a log; a last line that a killed run left half-written is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def now() -> str:
    """Return the time of day as ISO 8601, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
