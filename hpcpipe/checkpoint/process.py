"""A rank's handle on its writer process: starts it, sends it orders, hears what became of them, never waits."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hpcpipe
from hpcpipe.errors import DiskError

_NAP_S = 1e-3
_PART_BYTES = 1 << 16
_END_S = 5.0


class WriterProcess:
    """A process that writes checkpoints, so that training does not wait for the disk.

    It is a process and not a thread because HDF5 holds one lock for everything, and Python another. It is started as
    a new program, never by a bare fork, best before MPI is. Orders are carried out one after the other.

    Parameters
    ----------
    handle : int
        Descriptor of the `hpcpipe.memory.shared.SharedBlock` that snapshots are in.
    starts_now : bool
        Whether it starts at once, or with its first order.
    """

    def __init__(self, handle: int, *, starts_now: bool = True) -> None:
        self._handle = handle
        self._setup: list[dict[str, Any]] = []
        self._is_running = False
        if starts_now:
            self._start()

    def _start(self) -> None:
        parent_of_package = str(Path(hpcpipe.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (parent_of_package, os.environ.get("PYTHONPATH", ""))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hpcpipe.checkpoint.writer", str(os.getpid()), str(self._handle)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._handle,),
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._orders, self._answers):
            os.set_blocking(descriptor, False)
        self._unsent, self._heard = b"", b""
        self._is_running = True

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def prepare(self, order: dict[str, Any]) -> None:
        """Send an order that a process started in place of a dead one gets first as well."""
        self.send(order)
        self._setup.append(order)

    def send(self, order: dict[str, Any]) -> None:
        """Give an order, a dict that JSON can hold; it is carried out after those before it."""
        if not self._is_running:
            self._start()
            self._unsent = b"".join(map(_line, self._setup))
        self._unsent += _line(order)
        self._pass_on()

    def poll(self) -> list[dict[str, Any]]:
        """Return the answers that came since the last call.

        Returns
        -------
        list of dict
            Of each order its ``do``, and what the writer says of it. Where the process has died: one with ``died``,
            a sentence. What it was doing is lost; the next order starts another process.
        """
        if not self._is_running:
            return []
        self._pass_on()
        is_over = False
        while True:
            try:
                part = os.read(self._answers, _PART_BYTES)
            except BlockingIOError:
                break
            if not part:
                is_over = True
                break
            self._heard += part
        *lines, self._heard = self._heard.split(b"\n")
        answers = [json.loads(line) for line in lines]
        if is_over:
            answers.append({"died": self._end()})
        return answers

    def wait(self, until: Callable[[list[dict[str, Any]]], bool], limit_s: float) -> None:
        """Poll until the caller has heard enough.

        Raises
        ------
        DiskError
            If that takes longer than `limit_s`: the process is suspended, or waits for its file system.
        """
        deadline = time.monotonic() + limit_s
        while not until(self.poll()):
            if time.monotonic() > deadline:
                raise DiskError(
                    f"the process that writes this rank's checkpoints, {self.pid}, has not answered for {limit_s:,g} s:"
                    " its file system hangs, or it is suspended; see whether files can be written in run.dir"
                )
            time.sleep(_NAP_S)

    def kill(self) -> None:
        """End the process at once, whatever it is doing; the next order starts another."""
        if self._is_running:
            self._process.kill()
            self._end()

    def forget(self) -> None:
        """Forget what `prepare` was called with."""
        self._setup.clear()

    def close(self) -> None:
        """Let the process end when it has carried out its orders, or end it."""
        if not self._is_running:
            return
        self._close_pipes()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            # What waits for a file system that hangs does not end even then.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)

    def _end(self) -> str:
        """Say how a process ended that was not asked to."""
        self._close_pipes()
        code = self._process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"the process that writes this rank's checkpoints {how}"

    def _pass_on(self) -> None:
        """Write what the pipe takes."""
        while self._unsent:
            try:
                count = os.write(self._orders, self._unsent[:_PART_BYTES])
            except (BlockingIOError, BrokenPipeError):
                return
            self._unsent = self._unsent[count:]

    def _close_pipes(self) -> None:
        self._is_running = False
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _line(order: dict[str, Any]) -> bytes:
    return json.dumps(order).encode() + b"\n"
