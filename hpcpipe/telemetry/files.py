"""Small text files that appear whole or not at all, and logs of one JSON object per line."""

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from hpcpipe.errors import DiskError, NumericsError


def write_whole(path: Path, text: str) -> None:
    """Replace a text file, in UTF-8, in one step; names of files that are not UTF-8 keep their bytes.

    Raises
    ------
    DiskError
        If the file system refuses; the earlier file is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise _refused(path, error) from error


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object to a log.

    Floats are written with the fewest digits that read back to the same bits.

    Raises
    ------
    DiskError
        If the file system refuses.
    NumericsError
        If a value is NaN or infinite, which JSON does not have; nothing is written.
    """
    try:
        line = json.dumps(row, allow_nan=False)
    except ValueError as error:
        raise NumericsError(f"{path}: a value is not a finite number: {row}") from error
    try:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            content = (line + "\n").encode()
            try:
                written = file.write(content)
                if written != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                # Half a line would swallow the next one.
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        raise _refused(path, error) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a log, none if there is no log.

    Lines that are no objects are dropped, and so is a last line that a killed run left half-written.

    Raises
    ------
    DiskError
        If the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DiskError(
            f"{path} could not be read ({error.strerror}): move it away or choose another run.name"
        ) from error
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _refused(path: Path, error: OSError) -> DiskError:
    return DiskError(f"{path} could not be written ({error.strerror}): free space or choose another run.dir")


def now() -> str:
    """Return the time of day as ISO 8601, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
