"""Running the ``hpcpipe`` command in processes of its own, with a hard time limit and nothing left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HPCPIPE = str(Path(sys.executable).with_name("hpcpipe"))
MARK = "HPCPIPE_TEST_MARK"
"""Variable by which the processes of a command are known, also ranks in sessions of their own."""

WRITER = "hpcpipe.checkpoint.writer"
"""In the command line of the process beside each rank that writes checkpoints."""

SUPERVISOR = "hpcpipe.watch.supervisor"
"""In the command line of the process that looks for hangs of a node's ranks."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str
    elapsed_s: float

    @property
    def messages(self) -> list[str]:
        """The messages on standard error, each from its ``hpcpipe: error:`` to the next."""
        return self.stderr.split("hpcpipe: error: ")[1:]


class Command:
    """A running ``hpcpipe`` command and all processes that it started.

    Parameters
    ----------
    arguments : sequence
        The command line; a first word that is no path is a verb of ``hpcpipe``.
    mark : Path
        A directory of the test's own: the marker of the processes, and where their output goes.
    environ : mapping
        Variables to add.
    """

    def __init__(self, arguments: Sequence[object], mark: Path, environ: Mapping[str, str] | None = None) -> None:
        words = [str(word) for word in arguments]
        if not Path(words[0]).is_absolute():
            words.insert(0, HPCPIPE)
        mark.mkdir(parents=True, exist_ok=True)
        self._mark = f"{mark}#{os.urandom(4).hex()}"
        self._stdout, self._stderr = mark / "stdout", mark / "stderr"
        self._started = time.monotonic()
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **(environ or {}), MARK: self._mark},
                start_new_session=True,
            )

    def wait(self, limit_s: float) -> Finished:
        """Wait for the end of the command; at the limit everything is killed and the test fails."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not at its end after {limit_s:g} s\n{self._output()}") from None
        elapsed_s = time.monotonic() - self._started
        return Finished(
            code, self._stdout.read_text(errors="replace"), self._stderr.read_text(errors="replace"), elapsed_s
        )

    def processes(self) -> dict[int, str]:
        """Return the command line of every process of this command that has not ended."""
        return dict(_marked(self._mark))

    def ranks(self) -> list[int]:
        """Return the processes of the ranks in ascending order of rank."""
        found = {}
        for pid, words in self.processes().items():
            # What a rank has started has its environment.
            if WRITER in words or SUPERVISOR in words:
                continue
            rank = _variables(pid).get("OMPI_COMM_WORLD_RANK")
            if rank is not None:
                found[int(rank)] = pid
        return [found[rank] for rank in sorted(found)]

    def kill(self, signum: signal.Signals = signal.SIGKILL) -> None:
        """Signal every process of this command; after SIGKILL wait until they are gone."""
        deadline = time.monotonic() + 20
        while remaining := self.processes():
            for pid in remaining:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            if signum != signal.SIGKILL:
                return
            assert time.monotonic() < deadline, f"cannot be killed: {remaining}"
            time.sleep(0.01)
        self.process.wait()

    def assert_nobody_left(self, grace_s: float = 2.0) -> None:
        """Fail if a process of this command is still there after a moment."""
        deadline = time.monotonic() + grace_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            self.kill()
        assert not left, f"left behind: {left}"

    def _output(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in (self._stdout, self._stderr))


def run(
    arguments: Sequence[object], mark: Path, environ: Mapping[str, str] | None = None, limit_s: float = 120.0
) -> Finished:
    """Run a command to its end, and see that no process of it is left."""
    command = Command(arguments, mark, environ)
    try:
        finished = command.wait(limit_s)
        command.assert_nobody_left()
    finally:
        command.kill()
    return finished


def wait_until(condition: Any, what: str, command: Command, limit_s: float = 60.0) -> None:
    """Poll a condition while a command runs; fail if the command ends or the time is over before it holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if command.process.poll() is not None:
            raise AssertionError(f"the command ended before {what}: {command.wait(1)}")
        if time.monotonic() > deadline:
            command.kill()
            raise AssertionError(f"no {what} within {limit_s:g} s")
        time.sleep(0.01)


def rows(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of ``metrics.jsonl``; floats are the very text that stands in the file."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line, parse_float=str) for line in lines]


def step_rows(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of steps."""
    return [row for row in rows(directory) if "loss" in row]


def bits(directory: Path) -> list[tuple[str, ...]]:
    """Return what must be the same bits in every run: steps with loss and gradient norm, held-out losses."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "tokens", "val_loss", "bits_per_byte")
    return [tuple(f"{key} {row[key]}" for key in keys if key in row) for row in rows(directory)]


def status(directory: Path) -> dict[str, Any]:
    """Return the content of ``status.json``."""
    return json.loads((directory / "status.json").read_text())


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of a kind."""
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def _marked(mark: str) -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        if _variables(int(folder.name)).get(MARK) != mark:
            continue
        with contextlib.suppress(OSError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX":
                yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def _variables(pid: int) -> dict[str, str]:
    """Return the environment of a process as it was started; empty if it has ended or is not ours."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in content.split("\0") if "=" in pair)
