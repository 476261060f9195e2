"""A command under observation: its processes, the memory that they share, and what is done to it from outside."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MARK = "HPCPIPE_CHAOS_MARK"
"""Variable by which processes of a run are known, those in sessions of their own too."""

SHARED_MEMORY = Path("/dev/shm")

_WRITER = "hpcpipe.checkpoint.writer"
_SUPERVISOR = re.compile(r"hpcpipe\.watch|hpcpipe watch")
_MPIRUN = ("mpirun", "prterun")
_PROCESS_NUMBER = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK")
_LOOK_EVERY_S = 0.25


@dataclass(frozen=True)
class Process:
    """A process of a run.

    Attributes
    ----------
    pid : int
    words : str
        Its command line.
    number : int or None
        Number of the process in the first world communicator, also for what a rank has started.
    state : str
        As in proc(5): ``T`` is stopped.
    """

    pid: int
    words: str
    number: int | None
    state: str

    @property
    def kind(self) -> str:
        """``rank``, ``writer``, ``supervisor``, ``mpirun`` or ``other``."""
        if _WRITER in self.words:
            return "writer"
        if _SUPERVISOR.search(self.words):
            return "supervisor"
        if Path(self.words.split(" ")[0]).name in _MPIRUN:
            return "mpirun"
        return "rank" if self.number is not None else "other"


class Running:
    """A command and everything that it starts.

    Parameters
    ----------
    words : sequence of str
        The command.
    folder : Path
        Where its output goes; exists.
    environ : mapping
        Variables beside those of this process.

    Attributes
    ----------
    process : Popen
        The command itself.
    shared : set of Path
        Files below ``/dev/shm`` that processes of the run were seen to map.
    start_s : float
        When it started, by `time.monotonic`.
    """

    def __init__(self, words: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
        self._mark = f"{folder}#{os.urandom(4).hex()}"
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        self._next_look_s = 0.0
        self.shared: set[Path] = set()
        self.start_s = time.monotonic()
        with self._open(self._stdout) as stdout, self._open(self._stderr) as stderr:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **environ, MARK: self._mark},
                start_new_session=True,
            )

    @staticmethod
    def _open(path: Path) -> IO[bytes]:
        return path.open("ab")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start_s

    @property
    def output(self) -> str:
        """What it has printed, on standard error last."""
        return "".join(path.read_text(errors="replace") for path in (self._stdout, self._stderr))

    def processes(self) -> list[Process]:
        """Return its processes that have not ended."""
        folders = (folder for folder in Path("/proc").iterdir() if folder.name.isdigit())
        return [process for folder in folders if (process := self._look_at(folder)) is not None]

    def look(self) -> None:
        """Take note of shared memory, a few times per second."""
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + _LOOK_EVERY_S
        for process in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/maps").read_text(errors="replace").splitlines():
                    name = line.partition(f"{SHARED_MEMORY}/")[2]
                    if name and not name.endswith("(deleted)"):
                        self.shared.add(SHARED_MEMORY / name)

    def find(self, who: str) -> int:
        """Return the id of one of its processes.

        Parameters
        ----------
        who : str
            See `hpcpipe.chaos.row.Act`.

        Raises
        ------
        LookupError
            There is none.
        """
        if who == "launch":
            return self.process.pid
        kind, _, number = who.partition(" ")
        wanted = {"process": "rank"}.get(kind, kind)
        for process in self.processes():
            if process.kind == wanted and number in ("", str(process.number)):
                return process.pid
        raise LookupError(f"the run has no {who}")

    def signal(self, who: str, number: signal.Signals) -> None:
        """Send a signal to one of its processes, see `find`."""
        os.kill(self.find(who), number)

    def wait_until_alone(self, limit_s: float) -> list[Process]:
        """Wait until no process is left; return those that are after the limit."""
        end_s = time.monotonic() + limit_s
        while (left := self.processes()) and time.monotonic() < end_s:
            time.sleep(0.05)
        return left

    def kill(self) -> None:
        """Kill all that is left of it."""
        for _ in range(400):
            left = self.processes()
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            if not left:
                break
            time.sleep(0.05)
        self.process.wait()

    def _look_at(self, folder: Path) -> Process | None:
        try:
            content = (folder / "environ").read_bytes().decode(errors="replace")
            variables = dict(pair.split("=", 1) for pair in content.split("\0") if "=" in pair)
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return None
        if variables.get(MARK) != self._mark:
            return None
        number = next((int(variables[name]) for name in _PROCESS_NUMBER if name in variables), None)
        return None if state in "ZX" else Process(int(folder.name), words, number, state)
