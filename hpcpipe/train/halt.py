"""The halt file: a request to stop that is written into the run directory."""

import contextlib
import datetime
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcpipe.errors import UsageError

_LOOK_EVERY_S = 1.0
_MOST_BYTES = 200
_FORMS = "now, step N, time 2026-01-31T18:00:00Z or time 18:00"


@dataclass(frozen=True)
class Halt:
    """When to stop: the first of both, where given.

    Attributes
    ----------
    step : int or None
        After this step.
    time_s : float or None
        At this time, in seconds since 1970.
    words : str
        The request as a clause for people.
    """

    step: int | None
    time_s: float | None
    words: str

    def is_due(self, step: int, now_s: float) -> bool:
        """Tell whether a run should stop after `step`, at a time of day."""
        return (self.step is not None and step >= self.step) or (self.time_s is not None and now_s >= self.time_s)


def parse_halt(text: str, written_s: float) -> Halt:
    """Read a request to stop.

    Parameters
    ----------
    text : str
        The content of a halt file: empty or ``now``, ``step N``, ``time`` and ISO 8601, or ``time HH:MM``. Times
        without a zone are local.
    written_s : float
        When it was written, in seconds since 1970: ``HH:MM`` is the first such time after that.

    Raises
    ------
    UsageError
        It is none of these.
    """
    words = " ".join(text.split())
    if words.lower() in ("", "now"):
        return Halt(0, None, "halt file")
    step = re.fullmatch(r"step (\d{1,15})", words, re.IGNORECASE)
    if step:
        return Halt(int(step[1]), None, f"halt file: step {int(step[1])}")
    moment = re.fullmatch(r"(?:time )?(\d.*)", words, re.IGNORECASE)
    if moment:
        with contextlib.suppress(ValueError, OverflowError, OSError):
            return Halt(None, _time_s(moment[1], written_s), f"halt file: time {moment[1]}")
    raise UsageError(f"{words[:60]!r} is no time to stop: write {_FORMS}")


def _time_s(text: str, written_s: float) -> float:
    """Return a moment in seconds since 1970."""
    if not re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
        return datetime.datetime.fromisoformat(text).timestamp()
    wall = datetime.time.fromisoformat(text.zfill(8 if text.count(":") == 2 else 5))
    day = datetime.datetime.fromtimestamp(written_s).date()
    today = datetime.datetime.combine(day, wall).timestamp()
    if today >= written_s:
        return today
    return datetime.datetime.combine(day + datetime.timedelta(days=1), wall).timestamp()


class HaltFile:
    """The halt file of a run, looked at once a second.

    Parameters
    ----------
    path : Path
        Where it would be.
    warn : callable
        Takes a sentence about a file that says nothing that can be understood; called once for each content.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._next_look_s = 0.0
        self._seen: tuple[int, int, int] | None = None
        self._halt: Halt | None = None

    def asks(self, step: int) -> str:
        """Say in words why to stop after `step`; empty if there is no reason."""
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_EVERY_S
            self._look()
        halt = self._halt
        return halt.words if halt is not None and halt.is_due(step, time.time()) else ""

    def put_away(self) -> None:
        """Rename the file, so that the next start goes on."""
        with contextlib.suppress(OSError):
            self._path.replace(self._path.with_name(f"{self._path.name}.done"))
        self._seen = self._halt = None

    def _look(self) -> None:
        """Read the file if it has changed."""
        try:
            status = self._path.stat()
        except OSError:
            self._seen = self._halt = None
            return
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        # A shell makes the file before it writes to it: an empty one means something when it has stayed empty.
        if seen == self._seen and (self._halt is not None or status.st_size):
            return
        is_new = seen != self._seen
        self._seen = seen
        self._halt = None
        if not stat.S_ISREG(status.st_mode):
            # A pipe would wait for somebody to write into it.
            if is_new:
                self._warn(f"{self._path}: is not a regular file; the run goes on")
            return
        if is_new and not status.st_size:
            return
        try:
            with self._path.open("rb") as file:
                text = os.read(file.fileno(), _MOST_BYTES).decode("utf-8", "replace")
            self._halt = parse_halt(text, status.st_mtime)
        except (OSError, UsageError) as error:
            self._warn(f"{self._path}: {getattr(error, 'strerror', None) or error}; the run goes on")
