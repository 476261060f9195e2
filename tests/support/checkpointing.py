"""Checkpoints of a state without a run around it: the writer processes are those of a run."""

import secrets
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from mpi4py import MPI

from hpcpipe.checkpoint.layout import step_name
from hpcpipe.cluster.holder import fence_of
from hpcpipe.config.interval import Interval
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.cadence import Cadence
from hpcpipe.train.checkpoints import Checkpoints
from hpcpipe.train.directory import RunDirectory
from hpcpipe.train.lock import RunLock
from hpcpipe.train.state import State
from hpcpipe.train.writer_memory import WriterMemory


def shared_folder(comm: MPI.Intracomm, folder: Path) -> Path:
    """Return rank 0's folder on every rank."""
    return Path(comm.bcast(str(folder)))


class Told:
    """Takes what a run says and notes, on every rank."""

    def __init__(self):
        self.lines, self.logged, self.events = [], [], []

    def say(self, text):
        self.lines.append(text)

    def log(self, text):
        self.logged.append(text)

    def add(self, event, **facts):
        self.events.append({"event": event, **facts})


@contextmanager
def checkpoints_of(state: State, grid: Grid, directory: Path, every: int = 0):
    """Give the `Checkpoints` of a state, and what they say; the directory is locked by rank 0 meanwhile."""
    told, run = Told(), RunDirectory(directory)
    lock = RunLock(run.lock)
    if grid.comm.rank == 0:
        lock.acquire()
    session = SimpleNamespace(
        config=state.config,
        grid=grid,
        waiter=Waiter(60.0),
        directory=run,
        events=told,
        console=told,
        is_root=grid.comm.rank == 0,
        status=lambda step, code: None,
    )
    writer = WriterMemory()
    fence = {"path": str(run.lock), "fence": fence_of(run.lock) if session.is_root else ""}
    start = state.step
    state.step = 0
    data = {"digest": "", "tokenizer": "bytes"}
    token = grid.comm.bcast(secrets.token_hex(4))
    checkpoints = Checkpoints(session, state, writer, data, fence, Cadence(Interval(steps=every), 1e9, 0.0), token)
    state.step = start
    try:
        yield checkpoints, told
    except Exception:
        print(told.lines)
        raise
    finally:
        writer.close()
        if grid.comm.rank == 0:
            lock.release()


def save(state: State, grid: Grid, directory: Path) -> Path:
    """Write a checkpoint of a state as a run does at its end; returns its directory on every rank."""
    with checkpoints_of(state, grid, directory) as (checkpoints, told):
        checkpoints.finish({"val_loss": None}, save=True, read_back=True)
    assert [event["event"] for event in told.events] == ["checkpoint"], told.events
    return RunDirectory(directory).checkpoints / step_name(state.step)
