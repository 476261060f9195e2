"""``metrics.jsonl``: one object per step, and one per evaluation."""

import json
from collections.abc import Callable
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
    guard : callable, optional
        Called before anything is written; raises if it must not be.

    Attributes
    ----------
    num_dropped : int
        Rows that the file system has not taken.
    problem : str
        Why, of the last one.
    """

    def __init__(self, path: Path, guard: Callable[[], None] | None = None) -> None:
        self._path = path
        self._guard = guard or (lambda: None)
        self.num_dropped = 0
        self.problem = ""

    def keep_until(self, step: int) -> None:
        """Drop the rows of steps after `step`, which a restart computes again, and what is no row of a step."""
        self._guard()
        rows = [row for row in _steps(self._path) if row["step"] <= step]
        if rows or self._path.exists():
            write_whole(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; one that the file system does not take is counted, since training goes on without."""
        self._guard()
        try:
            append_line(self._path, row)
        except DiskError as error:
            self.num_dropped += 1
            self.problem = str(error)

    def read(self) -> list[dict[str, Any]]:
        """Return the rows of steps and evaluations so far, of earlier starts too."""
        return _steps(self._path)

    def lacks_evaluation(self, step: int) -> bool:
        """Return whether there is a row of a step, and none of an evaluation after it."""
        rows = [row for row in _steps(self._path) if row["step"] == step]
        return bool(rows) and not any("val_loss" in row for row in rows)


def last_step(path: Path) -> int:
    """Return the highest step of a metrics log, 0 if it has none or cannot be read."""
    try:
        return max((int(row["step"]) for row in _steps(path)), default=0)
    except DiskError:
        return 0


def _steps(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_lines(path) if type(row.get("step")) is int]
