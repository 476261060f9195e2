"""Start of the watch on a rank, before MPI is up: the memory file, this rank's slot, and the node's supervisor."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import hpcpipe
from hpcpipe.cluster.environment import rank_hint
from hpcpipe.watch.beacon import Beacon, NoBeacon
from hpcpipe.watch.memory import SHARED_MEMORY, MemoryFile, memory_name, sweep

_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def attach(
    fallback: Path | None,
    say: Callable[[str], None],
    environ: Mapping[str, str] = os.environ,
    folder: Path = SHARED_MEMORY,
) -> NoBeacon:
    """Show this rank to the node's supervisor, which local rank 0 starts.

    Nothing that fails here ends the run: a rank that cannot be watched says so and goes on.

    Parameters
    ----------
    fallback : Path or None
        Folder on disk for the memory file, where shared memory is full or absent; the system's temporary folder where
        it is None or does not exist.
    say : callable
        Takes a line of text for people; called on local rank 0 only.
    environ : mapping
        Of this process.
    folder : Path
        Shared memory.

    Returns
    -------
    NoBeacon
        A `Beacon` for a process that a launcher has started, if memory could be had.
    """
    hint = rank_hint(environ)
    if hint is None:
        return NoBeacon()
    process, size, slot = hint
    num_local = max([slot + 1, *(int(environ[name]) for name in _LOCAL_SIZES if environ.get(name, "").isdigit())])
    memory, problem = _open(fallback, folder, environ, num_local, size)
    if memory is None:
        if slot == 0:
            say(f"warning: hangs are not looked for, and there is no flight recorder: {problem}")
        return NoBeacon()
    if problem and slot == 0:
        say(f"warning: the ranks' memory file is {memory.path}, which may be slow: {problem}")
    found = memory

    def revive() -> None:
        with contextlib.suppress(OSError):
            start_supervisor(found.path)

    try:
        beacon = Beacon(found, slot, process, revive)
        if slot == 0:
            sweep(folder)
            start_supervisor(found.path)
    except OSError as error:
        if slot == 0:
            say(f"warning: hangs are not looked for: no supervisor could be started ({error.strerror})")
        return NoBeacon()
    return beacon


def start_supervisor(path: Path) -> subprocess.Popen[bytes]:
    """Start the supervisor of a node, a new program that outlives its parent.

    It keeps nothing of the parent open, since a launcher takes a rank for running as long as somebody has its output.

    Parameters
    ----------
    path : Path
        The memory file.

    Returns
    -------
    Popen
        The process; it need not be waited for.
    """
    parent_of_package = str(Path(hpcpipe.__file__).resolve().parent.parent)
    with open(os.devnull, "r+b") as nothing:  # noqa: PTH123
        return subprocess.Popen(
            [sys.executable, "-P", "-S", "-m", "hpcpipe.watch.supervisor", str(path)],
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": parent_of_package},
        )


def _open(
    fallback: Path | None, folder: Path, environ: Mapping[str, str], num_local: int, size: int
) -> tuple[MemoryFile | None, str]:
    """Open the memory file in the first place that takes it, and say what was wrong with those before."""
    name = memory_name(environ)
    on_disk = fallback if fallback is not None and fallback.is_dir() else Path(tempfile.gettempdir())
    problems: list[str] = []
    for place in (folder, on_disk):
        try:
            return MemoryFile(place / name, num_local, size), ", ".join(problems)
        except OSError as error:
            problems.append(f"{place}: {error.strerror or error}")
    return None, ", ".join(problems)
