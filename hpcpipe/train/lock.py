"""One run per directory: a lock that names its holder and that a dead holder does not keep."""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from hpcpipe.data.write import exclusive
from hpcpipe.errors import DiskError, InUseError

_RENEW_S = 5.0
_STALE_S = 60.0
_NOBODY: dict[str, Any] = {"host": "", "pid": 0, "process_start": "", "started": ""}


class RunLock:
    """The lock of a run directory, held by rank 0.

    The holder renews the file's time of change every few seconds. A lock is taken over if its process is gone from this
    machine, or if it is another machine's and has not been renewed for a minute. Runs that look at it at once wait for
    each other, where the file system has locks.

    Parameters
    ----------
    path : Path
        The lock file, in an existing directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = ""
        self._done = threading.Event()

    def acquire(self) -> str:
        """Take the lock.

        Returns
        -------
        str
            Who held it before, if a dead run's lock was taken over; else an empty string.

        Raises
        ------
        InUseError
            If another run holds it; names the process and the machine.
        DiskError
            If the file cannot be made or read; an incomplete one is not left behind.
        """
        self._content = json.dumps(_identity())
        try:
            with exclusive(self._path):
                taken_from = self._take()
        except DiskError as error:
            raise DiskError(f"{error}: free space, or choose another run.dir") from error
        threading.Thread(target=self._renew, daemon=True).start()
        return taken_from

    def _take(self) -> str:
        """Make the file, if need be in place of a dead run's."""
        taken_from = ""
        while not self._create():
            holder = _read(self._path)
            if holder is None:
                continue
            if _is_alive(holder, self._path):
                raise InUseError(
                    f"{self._path.parent} is in use by process {holder['pid']} on {holder['host']}, started"
                    f" {holder['started']}: wait for it, stop it, or choose another run.name"
                )
            taken_from = f"process {holder['pid']} on {holder['host']}"
            _remove_if_unchanged(self._path, holder)
        return taken_from

    def release(self) -> None:
        """Give the lock back, if it is still this run's."""
        self._done.set()
        try:
            if self._path.read_bytes() == self._content.encode():
                self._path.unlink()
        except OSError:
            return

    def _create(self) -> bool:
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._content.encode())
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _renew(self) -> None:
        while not self._done.wait(_RENEW_S):
            try:
                os.utime(self._path)
            except OSError:
                return


def is_held_by_another(path: Path) -> bool:
    """Return whether a lock file's holder is alive and not this process, or the file may not be read."""
    try:
        holder = _read(path)
        if holder is None or (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid()):
            return False
        return _is_alive(holder, path)
    except OSError as error:
        return not isinstance(error, IsADirectoryError)


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _process_start(pid: int) -> str:
    """Return when a process of this machine started, in clock ticks; empty if it has ended: numbers are reused."""
    try:
        # The name of the program, in parentheses, may be any bytes.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return ""
    # In a container nobody may ever collect a killed orphan: it stays as a zombie.
    return "" if fields[0] in "ZX" else fields[19]


def _read(path: Path) -> dict[str, Any] | None:
    """Return who holds a lock, or None if it is gone; a lock that stays unreadable belongs to nobody."""
    for _ in range(10):
        try:
            holder = {**_NOBODY, **json.loads(path.read_bytes())}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, RecursionError):
            time.sleep(0.05)
        else:
            return holder if all(type(holder[key]) is type(_NOBODY[key]) for key in _NOBODY) else _NOBODY
    return _NOBODY


def _is_alive(holder: dict[str, Any], path: Path) -> bool:
    if holder["host"] == socket.gethostname():
        return bool(holder["process_start"]) and _process_start(holder["pid"]) == holder["process_start"]
    try:
        return bool(holder["host"]) and time.time() - path.stat().st_mtime < _STALE_S
    except FileNotFoundError:
        return False


def _remove_if_unchanged(path: Path, holder: dict[str, Any]) -> None:
    """Remove a dead run's lock, unless somebody else took it over in the meantime."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.dead")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != holder:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
