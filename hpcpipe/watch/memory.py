"""The memory file that the ranks of a node and their supervisor share."""

import contextlib
import fcntl
import hashlib
import mmap
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from hpcpipe.cluster.environment import LAUNCH_ID
from hpcpipe.cluster.holder import process_start
from hpcpipe.watch.layout import (
    FACTS_AT,
    FACTS_BYTES,
    HEADER,
    MAGIC,
    NODE_BYTES,
    NOTE_BYTES,
    NOTES_AT,
    NUM_NOTES,
    RING_RECORDS,
    SLOT_BYTES,
    SUPERVISOR_AT,
    VERSION,
    read_identity,
    read_text,
    write_text,
)

SHARED_MEMORY = Path("/dev/shm")
"""Memory that processes share by name; a folder on disk does too."""

_NAP_S = 0.01
_NEW_NS = 60_000_000_000


def memory_name(environ: Mapping[str, str] = os.environ) -> str:
    """Return the name of the memory file: of this launch, on this node.

    Parameters
    ----------
    environ : mapping
        Of a process that a launcher started. Processes of one launch and node get the same name; two daemons of a
        launcher on one machine, which stand for two nodes, get two.
    """
    parent = str(os.getppid())
    # Differs from daemon to daemon, and is the same for ranks that a shell of their own was started for.
    server = next((environ[name] for name in sorted(environ) if name.startswith("PMIX_SERVER_URI")), parent)
    node = hashlib.blake2b(f"{socket.gethostname()} {server}".encode(), digest_size=4).hexdigest()
    return f"hpcpipe-{environ.get(LAUNCH_ID) or f'p{parent}'}-{node}"


def remove_leftovers(launch_id: str, patience_s: float = 1.0, folder: Path = SHARED_MEMORY) -> None:
    """See that nothing is left of a launch all of whose ranks have ended.

    Parameters
    ----------
    launch_id : str
        The launch; nothing is done if it is empty.
    patience_s : float
        How long its supervisor may take to write down what it has seen, and to remove the file itself.
    folder : Path
        Where memory files are.
    """
    deadline = time.monotonic() + patience_s
    while launch_id and (found := list(folder.glob(f"hpcpipe-{launch_id}-*"))):
        if time.monotonic() > deadline:
            for path in found:
                with contextlib.suppress(OSError):
                    path.unlink()
        time.sleep(_NAP_S)


def sweep(folder: Path = SHARED_MEMORY) -> None:
    """Remove memory files of launches all of whose processes were killed, the supervisor too, so that nobody could."""
    for path in folder.glob("hpcpipe-*-*"):
        with contextlib.suppress(OSError):
            memory = MemoryFile(path, 0)
            try:
                if memory.is_abandoned():
                    memory.unlink()
            finally:
                memory.close()


class MemoryFile:
    """A memory file, made by whoever opens it first.

    Parameters
    ----------
    path : Path
        Where; made with mode 0600.
    num_slots : int
        Ranks that must have room; 0: only those that it has room for already.
    num_processes : int
        Processes of the run on all nodes, noted if this call makes the file.

    Attributes
    ----------
    path : Path
        As above.
    view : memoryview
        All of it.

    Raises
    ------
    OSError
        It cannot be made, there is no room for it, or it is of another version.
    """

    def __init__(self, path: Path, num_slots: int, num_processes: int = 0) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if num_slots else 0)
        self._handle = os.open(path, flags, 0o600)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX)
            self._make(num_slots, num_processes)
            size = os.fstat(self._handle).st_size
            if size < NODE_BYTES:
                raise OSError(f"{path} is too short")
            self._map = mmap.mmap(self._handle, size)
            fcntl.lockf(self._handle, fcntl.LOCK_UN)
        except OSError:
            os.close(self._handle)
            raise
        self.view = memoryview(self._map)
        magic, version, slot_bytes, ring_records = HEADER.unpack_from(self.view)[:4]
        if (magic, version, slot_bytes, ring_records) != (MAGIC, VERSION, SLOT_BYTES, RING_RECORDS):
            self.close()
            raise OSError(f"{path} is no memory file of this version")

    def _make(self, num_slots: int, num_processes: int) -> None:
        """Give the file room; taking it now is what turns a full file system into an error and not a bus error."""
        if num_slots:
            os.posix_fallocate(self._handle, 0, NODE_BYTES + num_slots * SLOT_BYTES)
        if num_slots and os.pread(self._handle, 1, 0) == b"\0":
            moment = time.time_ns(), time.monotonic_ns()
            os.pwrite(self._handle, HEADER.pack(MAGIC, VERSION, SLOT_BYTES, RING_RECORDS, num_processes, *moment), 0)

    @property
    def num_processes(self) -> int:
        """Processes of the run on all nodes; 0 if that is not known."""
        return int(HEADER.unpack_from(self.view)[4])

    @property
    def num_slots(self) -> int:
        """Ranks that it had room for when it was mapped."""
        return (len(self.view) - NODE_BYTES) // SLOT_BYTES

    def has_grown(self) -> bool:
        """Return whether more ranks have come since it was mapped."""
        return os.fstat(self._handle).st_size > len(self.view)

    def slot(self, number: int) -> memoryview:
        """Return the slot of a local rank."""
        start = NODE_BYTES + number * SLOT_BYTES
        return self.view[start : start + SLOT_BYTES]

    def is_abandoned(self) -> bool:
        """Return whether it has been there for a while, and neither a supervisor nor a rank is left."""
        made_ns = HEADER.unpack_from(self.view)[6]
        if time.monotonic_ns() - made_ns < _NEW_NS or not self.claim():
            return False
        owners = (read_identity(self.slot(number)) for number in range(self.num_slots))
        return not any(one.process >= 0 and process_start(one.pid) == str(one.started) for one in owners)

    def claim(self) -> bool:
        """Become the one supervisor of the node; False if there is one."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def supervisor(self) -> tuple[int, int]:
        """Return the supervisor's pid and its last sign of life (monotonic ns); zeros before there is one."""
        pid, alive_ns = struct.unpack_from("<qq", self.view, SUPERVISOR_AT)
        return pid, alive_ns

    def sign(self, pid: int, alive_ns: int) -> None:
        """Give a sign of life of the supervisor."""
        struct.pack_into("<qq", self.view, SUPERVISOR_AT, pid, alive_ns)

    @property
    def num_gone(self) -> int:
        """How many processes of the node have gone."""
        return int(struct.unpack_from("<q", self.view, SUPERVISOR_AT + 16)[0])

    @num_gone.setter
    def num_gone(self, count: int) -> None:
        struct.pack_into("<q", self.view, SUPERVISOR_AT + 16, count)

    @property
    def facts(self) -> str:
        """What the ranks let the supervisor know, JSON; empty before they do."""
        return read_text(self.view, FACTS_AT, FACTS_BYTES)

    @facts.setter
    def facts(self, text: str) -> None:
        write_text(self.view, FACTS_AT, FACTS_BYTES, text)

    @property
    def num_notes(self) -> int:
        """How many texts there were for the ranks to print."""
        return int(struct.unpack_from("<q", self.view, NOTES_AT)[0])

    def add_note(self, process: int, text: str) -> None:
        """Give a process a text to print."""
        count = self.num_notes
        write_text(self.view, NOTES_AT + 8 + count % NUM_NOTES * NOTE_BYTES, NOTE_BYTES, f"{process} {text}")
        struct.pack_into("<q", self.view, NOTES_AT, count + 1)

    def notes(self, process: int, since: int) -> list[str]:
        """Return the texts for a process from the given number on, as far as they are still there."""
        count = self.num_notes
        places = (number % NUM_NOTES for number in range(max(since, count - NUM_NOTES), count))
        texts = [read_text(self.view, NOTES_AT + 8 + place * NOTE_BYTES, NOTE_BYTES) for place in places]
        return [text.partition(" ")[2] for text in texts if text.startswith(f"{process} ")]

    def unlink(self) -> None:
        """Remove the file; whoever has mapped it keeps it."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def close(self) -> None:
        """Unmap it, unless parts are in use, and close it."""
        self.view.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self._handle)
