"""What every part of a run shares: its place, its files, its voice."""

from dataclasses import dataclass, field
from pathlib import Path

from hpcpipe.cluster.binding import Binding
from hpcpipe.config.check import check_stages
from hpcpipe.config.schema import Config
from hpcpipe.errors import ExitCode, UsageError
from hpcpipe.kernels.threads import Team
from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.build import build
from hpcpipe.schedule.csv_file import build_from_csv
from hpcpipe.telemetry.console import Console
from hpcpipe.telemetry.events import EventLog
from hpcpipe.telemetry.metrics import MetricsLog
from hpcpipe.telemetry.status import write_status
from hpcpipe.train.choose import AUTO, PLAIN
from hpcpipe.train.directory import RunDirectory
from hpcpipe.train.lock import RunLock
from hpcpipe.watch.beacon import NoBeacon


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
    num_local_ranks, num_local_cores : int
        Ranks of the run on this node, and the cores that they may use.
    binding : Binding
        Which cores the ranks of this node compute on.
    team : Team
        This rank's threads.
    waiter : Waiter
        Waits, with its deadline.
    mode : MessageMode
        How messages are sent.
    console : Console
        Rank 0's voice, quiet on the others.
    events : EventLog
        Rank 0's record of what happened, nothing on the others.
    lock : RunLock or None
        The run directory's, on rank 0, which writes nothing without it; None where there is no run directory.
    start_step : int or None
        Step that this start goes on from, once that is known and the metrics of later steps are gone.
    beacon : NoBeacon
        Shows what this rank does, for the supervisor of its node.
    """

    config: Config
    schedule: Schedule
    directory: RunDirectory
    grid: Grid
    num_local_ranks: int
    num_local_cores: int
    binding: Binding
    team: Team
    waiter: Waiter
    mode: MessageMode
    console: Console
    events: EventLog
    lock: RunLock | None = None
    start_step: int | None = None
    beacon: NoBeacon = field(default_factory=NoBeacon)

    @property
    def share_of_core(self) -> float:
        """The part of a core that each thread that computes has."""
        threads = self.team.num_threads if self.config.train.precision == "bf16" else 1
        return min(1.0, self.num_local_cores / (self.num_local_ranks * threads))

    @property
    def is_root(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.grid.comm.rank == 0

    @property
    def metrics(self) -> MetricsLog | None:
        """The metrics, on the rank that writes them."""
        return MetricsLog(self.directory.metrics, self.require_lock) if self.is_root else None

    def require_lock(self) -> None:
        """Refuse to write if the run directory is another run's by now, on rank 0.

        Raises
        ------
        InUseError
            On rank 0 alone.
        """
        if self.lock is not None:
            self.lock.check()

    def begin(self, step: int) -> None:
        """Say in ``status.json`` which step the run goes on from, on rank 0."""
        self.start_step = step
        self.status(step, None)

    def status(self, step: int, exit_code: ExitCode | None, cause: str = "") -> None:
        """Write ``status.json``, on rank 0."""
        if self.is_root:
            self.require_lock()
            write_status(self.directory.path, step, exit_code, cause, start_step=self.start_step)


def build_schedule(config: Config) -> Schedule:
    """Return the proven schedule of a resolved configuration: by its name, or from a CSV file.

    For ``auto`` it is 1F1B of one microbatch, which needs no more memory than any other, until costs are known and
    `hpcpipe.train.plan` chooses.

    Raises
    ------
    UsageError
        If the schedule does not exist, cannot be read, or is not for these numbers.
    """
    parallel = config.parallel
    num_microbatches = parallel.microbatches // parallel.data
    if parallel.schedule == AUTO:
        return build(PLAIN, parallel.pipeline, 1)
    if not parallel.schedule.endswith(".csv"):
        return build(parallel.schedule, parallel.pipeline, num_microbatches, parallel.chunks)
    path = Path(parallel.schedule)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"parallel.schedule = {path}: the file could not be read ({error})") from error
    schedule = build_from_csv(text, str(path))
    for key, found, wanted in (
        ("parallel.pipeline", schedule.num_ranks, parallel.pipeline),
        ("parallel.microbatches / parallel.data", schedule.num_microbatches, num_microbatches),
    ):
        if found != wanted:
            raise UsageError(
                f"parallel.schedule = {path} is for {key} = {found}, and here it is {wanted}: set it to {found}"
            )
    return schedule


def check_schedule(config: Config, schedule: Schedule) -> Config:
    """Check that the model fills the stages of `build_schedule`'s result, and fill in the chunks that it has.

    With ``auto`` the chunks stay open, and all that can be said is whether the model is deep enough for one stage, or
    as many as are asked for, on every rank.

    Raises
    ------
    UsageError
        As `hpcpipe.config.check.check_stages`.
    """
    parallel = config.parallel
    if schedule.is_forward_only:
        raise UsageError(
            f"parallel.schedule = {parallel.schedule} has no backward, so that nothing would be trained: choose another"
            ' one, such as "1f1b", or "auto"'
        )
    if parallel.schedule != AUTO:
        return check_stages(config, schedule.num_stages)
    given = 0 if isinstance(parallel.partition, str) else len(parallel.partition)
    check_stages(config, parallel.pipeline * parallel.chunks or given or parallel.pipeline)
    return config
