"""``metrics.jsonl``: one object per step, and one per evaluation."""

import json
from pathlib import Path
from typing import Any

from hpcpipe.errors import DiskError
from hpcpipe.telemetry.files import append_line, read_lines, write_whole


class MetricsLog:
    """The metrics of a run over all its restarts.

    Parameters
    ----------
    path : Path
        The file; made by the first row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep_until(self, step: int) -> None:
        """Drop the rows of steps after `step`, which a restart computes again, and what is no row of a step."""
        rows = [row for row in _steps(self._path) if row["step"] <= step]
        if rows or self._path.exists():
            write_whole(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        append_line(self._path, row)


def last_step(path: Path) -> int:
    """Return the highest step of a metrics log, 0 if it has none or cannot be read."""
    try:
        return max((int(row["step"]) for row in _steps(path)), default=0)
    except DiskError:
        return 0


def _steps(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_lines(path) if type(row.get("step")) is int]
