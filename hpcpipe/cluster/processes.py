"""Processes of this node, as Linux lists them (proc(5))."""

import contextlib
import os
import signal
from pathlib import Path


def children(pid: int) -> list[int]:
    """List the running children of a process.

    Parameters
    ----------
    pid : int
        The parent.

    Returns
    -------
    list of int
        Without those that have ended and wait to be collected.
    """
    return [child for child, parent, _, state in _processes() if parent == pid and state not in "ZX"]


def is_running(pid: int) -> bool:
    """Return whether a process has not ended yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def variable(pid: int, name: str) -> str | None:
    """Return a variable of the environment that a process was started with.

    Parameters
    ----------
    pid : int
        The process.
    name : str
        The variable.

    Returns
    -------
    str or None
        None where it is not set, or the process has ended or is another user's.
    """
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    start = f"{name}=".encode()
    found = next((entry for entry in content.split(b"\0") if entry.startswith(start)), None)
    return None if found is None else found[len(start) :].decode(errors="replace")


def kill_session(session: int) -> None:
    """Kill every process of a session, whatever its process group.

    Parameters
    ----------
    session : int
        The process that began the session.
    """
    for pid, _, owner, state in _processes():
        if owner == session and state not in "ZX":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _processes() -> list[tuple[int, int, int, str]]:
    """List (process, parent, session, state) of every process."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        found.append((int(folder.name), int(parent), int(session), state))
    return found
