"""The run directory: where each of its files is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcpipe.config.schema import RunConfig
from hpcpipe.errors import DiskError
from hpcpipe.telemetry.events import EventLog
from hpcpipe.train.lock import RunLock


@dataclass(frozen=True)
class RunDirectory:
    """Paths below the directory of a run."""

    path: Path

    @classmethod
    def of(cls, run: RunConfig) -> "RunDirectory":
        """Return the directory that a configuration names."""
        return cls(Path(run.dir) / run.name)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def prediction(self) -> Path:
        """What a step was predicted to take, before the first one."""
        return self.path / "prediction.json"

    @property
    def schedule(self) -> Path:
        """The schedule that runs, as `hpcpipe schedule` reads it."""
        return self.path / "schedule.csv"

    @property
    def metrics(self) -> Path:
        """One object per step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened to the run."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One directory per checkpoint."""
        return self.path / "checkpoints"

    @property
    def halt(self) -> Path:
        """Asks the run to stop, see `hpcpipe.train.halt`."""
        return self.path / "halt"

    @property
    def lock(self) -> Path:
        """Held by the run that writes here."""
        return self.path / "lock.json"


def open_directory(directory: RunDirectory, lock: RunLock, say: Callable[[str], None]) -> None:
    """Make a run directory if need be, take its lock, and tell if that was a dead run's.

    Parameters
    ----------
    directory : RunDirectory
        Where.
    lock : RunLock
        The directory's.
    say : callable
        Takes a line of text for people.

    Raises
    ------
    DiskError
        If the file system refuses.
    InUseError
        If another run has the lock.
    """
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{directory.path} could not be made ({error.strerror}): choose another run.dir") from error
    holder = lock.acquire()
    if holder:
        say(f"lock taken over: {holder} held the run directory, and is gone")
        EventLog(directory.events).add("lock taken over", holder=holder)
