"""``events.jsonl``: what happened to a run, with the time of day."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcpipe.errors import DiskError
from hpcpipe.telemetry.files import append_line, now, read_lines


class EventLog:
    """The events of a run over all its restarts.

    Parameters
    ----------
    path : Path or None
        The file; None on ranks that do not write it.
    guard : callable, optional
        Called before each event is written; raises if it must not be.

    Attributes
    ----------
    num_dropped : int
        Events that the file system has not taken.
    """

    def __init__(self, path: Path | None, guard: Callable[[], None] | None = None) -> None:
        self._path = path
        self._guard = guard
        self.num_dropped = 0

    def add(self, event: str, **facts: Any) -> None:
        """Append an event with its facts; one that the file system does not take is counted."""
        if self._path is None:
            return
        if self._guard is not None:
            self._guard()
        try:
            append_line(self._path, {"time": now(), "event": event, **facts})
        except DiskError:
            self.num_dropped += 1

    def read(self) -> list[dict[str, Any]]:
        """Return all events so far, of earlier starts too; none on ranks that do not write them."""
        return read_lines(self._path) if self._path is not None else []
