"""``metrics.jsonl``: one object per step, and one per evaluation."""

import json
from pathlib import Path
from typing import Any

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
        """Drop the rows of steps after `step`: a restart computes them again."""
        if self._path.exists():
            rows = [row for row in read_lines(self._path) if row["step"] <= step]
            write_whole(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        append_line(self._path, row)
