"""What was seen of a run: its end, its files, and what it left behind."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcpipe.chaos.running import Process

_BITS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "val_loss", "bits_per_byte")


@dataclass(frozen=True)
class Seen:
    """What was seen of one launch.

    Attributes
    ----------
    directory : Path
        The run directory.
    code : int or None
        Exit code of the command; None: it had to be killed at its limit.
    elapsed_s : float
        Seconds until its end.
    end_s : float
        Seconds from the last act until its end.
    output : str
        What it printed.
    stray : list of Process
        Processes that were left some seconds after the end.
    shared : list of Path
        Files in shared memory that were left.
    problems : list of str
        What could not be done to the run.
    """

    directory: Path
    code: int | None
    elapsed_s: float
    end_s: float = 0.0
    output: str = ""
    stray: list[Process] = field(default_factory=list)
    shared: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> dict[str, Any]:
        """What ``status.json`` says, nothing if it cannot be read."""
        try:
            content = json.loads((self.directory / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def bits(self) -> list[tuple[str, ...]]:
        """What must be equal of the rows of ``metrics.jsonl``, as the very texts in the file."""
        return [tuple(f"{key} {row[key]}" for key in _BITS if key in row) for row in self._lines("metrics.jsonl")]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of a name, the first one first."""
        return [row for row in self._lines("events.jsonl") if row.get("event") == name]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name
        if not path.exists():
            return []
        lines = path.read_text(errors="replace").split("\n")
        # A line that a killed process left half-written is followed by whole ones, or by none.
        rows = []
        for line in filter(None, lines):
            try:
                rows.append(json.loads(line, parse_float=str))
            except ValueError:
                rows.append({"unreadable": line})
        return rows
