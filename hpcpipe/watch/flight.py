"""Flight recorders on disk: what ranks did last, kept when one of them hangs, dies or fails."""

import contextlib
import json
import shutil
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcpipe.errors import DamagedError
from hpcpipe.watch.layout import (
    ROLE_AT,
    SLOT_HEADER_BYTES,
    WAIT_TEXT_AT,
    WAIT_TEXT_BYTES,
    Identity,
    Record,
    State,
    read_identity,
    read_ring,
    read_state,
    read_text,
)

MAGIC = b"HPCFLGHT"
VERSION = 1
KEPT = 8
"""Folders of flight recorders that a run keeps, the newest."""

_HEADER = struct.Struct("<8sIIqq")


@dataclass(frozen=True)
class Flight:
    """The flight recorder of one rank.

    Attributes
    ----------
    identity : Identity
        Who it was.
    state : State or None
        What it did when the copy was made.
    waits_for : str
        For what it waited, in its own words; an old wait's if it does not wait.
    role : int
        The rank that it was in the grid; -1: a spare.
    records : list of Record
        What it did before, oldest first.
    wall_ns, monotonic_ns : int
        When the copy was made, on both clocks.
    """

    identity: Identity
    state: State | None
    waits_for: str
    role: int
    records: list[Record]
    wall_ns: int
    monotonic_ns: int

    @property
    def offset_ns(self) -> int:
        """What to add to its times to get the time of day: monotonic clocks of two nodes have nothing in common."""
        return self.wall_ns - self.monotonic_ns


def pack(slot: bytes | memoryview) -> bytes:
    """Return the content of a file: a header, and the slot as it is."""
    return _HEADER.pack(MAGIC, VERSION, SLOT_HEADER_BYTES, time.time_ns(), time.monotonic_ns()) + bytes(slot)


def unpack(content: bytes, name: str = "flight recorder") -> Flight:
    """Read the content of a file.

    Raises
    ------
    DamagedError
        It is none, or of another version.
    """
    if len(content) < _HEADER.size + SLOT_HEADER_BYTES or content[:8] != MAGIC:
        raise DamagedError(f"{name} is no flight recorder: give the run directory of hpcpipe train")
    _, version, header_bytes, wall_ns, monotonic_ns = _HEADER.unpack_from(content)
    if (version, header_bytes) != (VERSION, SLOT_HEADER_BYTES):
        raise DamagedError(f"{name} has version {version}, and this hpcpipe reads {VERSION}: use the one that wrote it")
    slot = content[_HEADER.size :]
    text = read_text(slot, WAIT_TEXT_AT, WAIT_TEXT_BYTES)
    ring = slot[SLOT_HEADER_BYTES:]
    (role,) = struct.unpack_from("<q", slot, ROLE_AT)
    return Flight(read_identity(slot), read_state(slot), text, role - 1, read_ring(ring), wall_ns, monotonic_ns)


def save(directory: Path, name: str, contents: Mapping[int, bytes], cause: Mapping[str, Any]) -> None:
    """Write the flight recorders of a node into a run directory, and remove the oldest folders beyond `KEPT`.

    Parameters
    ----------
    directory : Path
        The run directory.
    name : str
        Of the folder below its `flight`; names sort by time. Several nodes may write to one folder.
    contents : mapping of int to bytes
        By process number, what `pack` returned.
    cause : mapping
        Why they are kept; JSON.

    Raises
    ------
    OSError
        The file system refuses.
    """
    folder = directory / "flight" / name
    folder.mkdir(parents=True, exist_ok=True)
    for process, content in contents.items():
        (folder / f"rank-{process:04d}.bin").write_bytes(content)
    (folder / "cause.json").write_text(json.dumps(dict(cause), indent=1) + "\n")
    prune(directory / "flight")


def prune(folder: Path) -> None:
    """Remove the oldest folders in one, beyond `KEPT`."""
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def list_flights(directory: Path) -> list[Path]:
    """Return the folders of flight recorders of a run, oldest first."""
    return _folders(directory / "flight")


def load(folder: Path) -> tuple[dict[int, Flight], dict[str, Any]]:
    """Read a folder of flight recorders: by process number, and why they were kept.

    Raises
    ------
    DamagedError
        A file is no flight recorder.
    """
    flights = {}
    for path in sorted(folder.glob("rank-*.bin")):
        flight = unpack(path.read_bytes(), str(path))
        flights[flight.identity.process] = flight
    cause: Any = {}
    with contextlib.suppress(OSError, ValueError):
        cause = json.loads((folder / "cause.json").read_text())
    return flights, cause if isinstance(cause, dict) else {}


def merge(flights: Mapping[int, Flight]) -> list[tuple[int, int, Record]]:
    """Return the records of all ranks by the time of day at which they ended.

    Returns
    -------
    list of (int, int, Record)
        Time of day in ns, process number, record.
    """
    found = [
        (record.end_ns + flight.offset_ns, process, record)
        for process, flight in flights.items()
        for record in flight.records
    ]
    return sorted(found, key=lambda entry: (entry[0], entry[1], entry[2].number))


def rings(flights: Mapping[int, Flight]) -> dict[int, Sequence[Record]]:
    """Return the records of each rank."""
    return {process: flight.records for process, flight in flights.items()}


def _folders(folder: Path) -> list[Path]:
    """Return the folders in one, by name."""
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.is_dir())
    return []
