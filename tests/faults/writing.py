"""A job that writes checkpoints as ranks and their writer processes do, to be killed at any moment."""

import itertools
import json
import os
import random
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

from made import Model

from hpcpipe.checkpoint import writer as writer_program
from hpcpipe.checkpoint.layout import partial_name
from hpcpipe.checkpoint.snapshot import Snapshot, snapshot_bytes
from hpcpipe.cluster.environment import parent_signal
from hpcpipe.memory.shared import SharedBlock

CALLS = (
    "open",
    "posix_fallocate",
    "write",
    "fsync",
    "close",
    "preadv",
    "rename",
    "mkdir",
    "unlink",
    "rmdir",
    "scandir",
)


class Job:
    """A process that plays the ranks of a run, and its children that write: the program of the writers itself.

    It writes checkpoint after checkpoint until it is killed, or until a writer is and it ends by itself.

    Parameters
    ----------
    model : Model
        What is written.
    root : Path
        The run's ``checkpoints`` directory.
    first_step : int
        The step to begin with.
    num_steps : int
        How many are written if nothing happens.
    doomed : (int, int, random.Random), optional
        A writer that kills itself, at which system call of its own, and where within a write.
    """

    def __init__(
        self,
        model: Model,
        root: Path,
        first_step: int,
        num_steps: int,
        doomed: tuple[int, int, random.Random] | None = None,
    ) -> None:
        reports, mine = Pipe(duplex=False)
        self._pid = os.fork()
        if self._pid == 0:
            reports.close()
            _end_with(lambda: _play(model, root, range(first_step, first_step + num_steps), mine, doomed))
        mine.close()
        self._reports = reports
        self.writers: list[int] = reports.recv()

    def kill(self, writer: int | None) -> None:
        """Kill a writer, or the ranks themselves: then the kernel ends the writers."""
        target = self._pid if writer is None else self.writers[writer]
        os.kill(target, signal.SIGKILL)

    def wait(self) -> bool:
        """Return when no process of the job is left; tell whether it came to its end."""
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        try:
            # All of them hold the other end.
            while True:
                self._reports.recv()
        except EOFError:
            self._reports.close()
        return code == 0


class _Writer:
    """A rank's end of its writer."""

    def __init__(self, number: int, model: Model, prepare: Callable[[], None]) -> None:
        sizes = [spec.num_bytes for spec in model.specs()[number]]
        shared = SharedBlock("snapshot")
        self._memory = shared.allocate(snapshot_bytes(sizes))
        self._snapshot = Snapshot(self._memory, sizes)
        orders, send = os.pipe()
        receive, answers = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(send)
            os.dup2(orders, 0)
            os.dup2(answers, 1)
            sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
            prepare()
            _end_with(lambda: writer_program.main([str(parent), str(shared.handle)]))
        os.close(orders)
        os.close(answers)
        self._orders, self._answers = os.fdopen(send, "w"), os.fdopen(receive)
        specs = [spec.to_json() for spec in model.specs()[number]]
        self.ask({"do": "prepare", "rank": number, "pieces": specs, "bytes": self._memory.nbytes})

    def take(self, arrays: Sequence[Any]) -> None:
        """Take a snapshot."""
        self._snapshot.take(arrays)

    def order(self, order: dict[str, Any]) -> None:
        """Give an order."""
        print(json.dumps(order), file=self._orders, flush=True)

    def answer(self) -> dict[str, Any]:
        """Wait for the answer; a dead writer ends the job."""
        line = self._answers.readline()
        answer = json.loads(line) if line else {"failed": "died"}
        if "failed" in answer:
            raise RuntimeError(str(answer))
        return dict(answer)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        self.order(order)
        return self.answer()


def _play(
    model: Model, root: Path, steps: range, report: Connection, doomed: tuple[int, int, random.Random] | None
) -> None:
    """Be the ranks."""
    parent_signal(signal.SIGKILL)
    writers = []
    for number in range(model.num_writers):
        prepare = (lambda: _doom(doomed[1], doomed[2])) if doomed and doomed[0] == number else (lambda: None)
        writers.append(_Writer(number, model, prepare))
    report.send([writer.pid for writer in writers])
    token = secrets.token_hex(4)
    writers[0].ask({"do": "clean", "root": str(root), "token": token})
    for step in steps:
        partial = str(root / partial_name(step, token))
        for writer, pieces in zip(writers, model.pieces(step), strict=True):
            writer.take([piece.data for piece in pieces])
            writer.order({"do": "write", "step": step, "partial": partial})
        records = [writer.answer()["record"] for writer in writers]
        order = {"do": "commit", "partial": partial, "header": model.header(step), "records": records}
        path = writers[0].ask(order)["path"]
        for writer in writers:
            writer.order({"do": "verify", "path": path})
        for writer in writers:
            writer.answer()
        rules = {"keep": 2, "keep_every": 5, "keep_best": True}
        writers[0].ask({"do": "retain", "root": str(root), "newest": path, **rules})


def _doom(number: int, draw: random.Random) -> None:
    """Let this process kill itself at a system call, after a part of it if it is a write."""
    count = itertools.count(1)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if next(count) == number:
                if name == "write":
                    call(args[0], args[1][: draw.randrange(len(args[1]) + 1)])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return instead

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def _end_with(function: Callable[[], None]) -> NoReturn:
    """Run a function and end the process, whatever happens, without what its parent has yet to do."""
    code = 1
    try:
        function()
        code = 0
    except RuntimeError:
        pass
    finally:
        os._exit(code)
