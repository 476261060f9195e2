"""What every part of a run shares: its place, its files, its voice."""

from dataclasses import dataclass

from hpcpipe.config.schema import Config
from hpcpipe.errors import ExitCode
from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.build import build
from hpcpipe.telemetry.console import Console
from hpcpipe.telemetry.events import EventLog
from hpcpipe.telemetry.metrics import MetricsLog
from hpcpipe.telemetry.status import write_status
from hpcpipe.train.directory import RunDirectory


@dataclass
class Session:
    """One run on one rank.

    Attributes
    ----------
    config : Config
        Resolved.
    schedule : Schedule
        What the ranks of each pipeline do in a step.
    directory : RunDirectory
        Where the run keeps its files; only rank 0 writes the small ones.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    mode : MessageMode
        How messages are sent.
    console : Console
        Rank 0's voice, quiet on the others.
    events : EventLog
        Rank 0's record of what happened, nothing on the others.
    """

    config: Config
    schedule: Schedule
    directory: RunDirectory
    grid: Grid
    waiter: Waiter
    mode: MessageMode
    console: Console
    events: EventLog

    @property
    def is_root(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.grid.comm.rank == 0

    @property
    def metrics(self) -> MetricsLog | None:
        """The metrics, on the rank that writes them."""
        return MetricsLog(self.directory.metrics) if self.is_root else None

    def status(self, step: int, exit_code: ExitCode | None, cause: str = "") -> None:
        """Write ``status.json``, on rank 0."""
        if self.is_root:
            write_status(self.directory.path, step, exit_code, cause)


def build_schedule(config: Config) -> Schedule:
    """Return the proven schedule of a resolved configuration.

    Raises
    ------
    UsageError
        If the schedule does not exist, or not for these numbers.
    """
    parallel = config.parallel
    return build(parallel.schedule, parallel.pipeline, parallel.microbatches // parallel.data, parallel.chunks)
