"""What a process keeps of a run while ranks come and go around it."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from hpcpipe.config.schema import Config
from hpcpipe.data.reader import TokenFile
from hpcpipe.data.windows import HeldOut, Samples
from hpcpipe.errors import ExitCode, HpcpipeError
from hpcpipe.mpi.crew import Crew
from hpcpipe.mpi.grid import Grid
from hpcpipe.recovery.copies import Copies
from hpcpipe.recovery.standing import NOTHING
from hpcpipe.telemetry.console import Console
from hpcpipe.telemetry.events import EventLog
from hpcpipe.telemetry.metrics import last_step
from hpcpipe.telemetry.status import read_status, write_status
from hpcpipe.train.directory import open_directory
from hpcpipe.train.lock import RunLock
from hpcpipe.train.outline import Outline
from hpcpipe.train.session import Session
from hpcpipe.train.state import State
from hpcpipe.train.stop import StopRequest
from hpcpipe.train.writer_memory import WriterMemory


@dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes
    ----------
    host : str
        Name of the machine.
    pid : int
        Number of the process there.
    """

    host: str
    pid: int


@dataclass
class Member:
    """A process of a run: a rank, or a spare.

    Attributes
    ----------
    crew : Crew
        All live processes.
    base : Session
        What they share before there is a grid.
    stop : StopRequest
        Of this process.
    writer : WriterMemory
        Its writer process.
    resume : str
        What to go on from, as the command line says.
    tokens, samples, held_out
        What is trained on, and evaluated.
    processes : tuple of int
        The number in the launch of each live process, in their order.
    roles : tuple of int
        The rank of each in the grid, -1 for a spare.
    places : tuple of Place
        Where each process of the launch runs, by its number.
    token : str
        Hexadecimal digits that name the launch.
    grid : Grid or None
        Of this epoch; None for a spare.
    outline : Outline or None
        The plan, once there is one.
    state : State or None
        What this rank trains, once it is filled.
    copies : Copies or None
        What it keeps of its own and its neighbour's state.
    epoch : int
        Number of recoveries so far.
    at_most : int
        Latest step that the next start from the disk may go on from, -1 for any.
    console : Console or None
        The voice of the run, if this process has ever spoken for it.
    lock : RunLock or None
        The run directory's, likewise.
    attempts : int
        Recoveries without a step that had not been finished before the last one.
    speaks_last : bool
        Whether this process says why all leave, whatever its role.
    dead_spares : set of int
        Live processes of this epoch that have turned out to be dead.
    story : dict or None
        What the last recovery was about, until it is told.
    """

    crew: Crew
    base: Session
    stop: StopRequest
    writer: WriterMemory
    resume: str
    tokens: TokenFile
    samples: Samples
    held_out: HeldOut
    processes: tuple[int, ...]
    roles: tuple[int, ...]
    places: tuple[Place, ...]
    token: str
    grid: Grid | None = None
    outline: Outline | None = None
    state: State | None = None
    copies: Copies | None = None
    epoch: int = 0
    at_most: int = NOTHING
    console: Console | None = None
    lock: RunLock | None = None
    attempts: int = 0
    speaks_last: bool = False
    dead_spares: set[int] = field(default_factory=set)
    story: dict[str, Any] | None = None
    _reached: int = NOTHING

    @property
    def role(self) -> int:
        """The rank of this process in the grid, -1 for a spare."""
        return self.roles[self.processes.index(self.crew.process)]

    @property
    def config(self) -> Config:
        """The configuration, as far as it is decided."""
        return self.outline.config if self.outline else self.base.config

    @property
    def root(self) -> int:
        """The live process that speaks for the run."""
        return self.roles.index(0)

    @property
    def had_spares(self) -> bool:
        """Whether the launch had more processes than ranks."""
        parallel = self.base.config.parallel
        return len(self.places) > parallel.pipeline * parallel.data

    def num_roles(self) -> int:
        """Return the number of ranks of the grid."""
        return max(self.roles) + 1

    def places_of_ranks(self) -> list[Place]:
        """Return where each rank of the grid runs."""
        by_role = dict(zip(self.roles, self.processes, strict=True))
        return [self.places[by_role[role]] for role in range(self.num_roles())]

    def spares(self) -> list[int]:
        """Return the live processes without a role."""
        return [rank for rank, role in enumerate(self.roles) if role == NOTHING]

    def session(self) -> Session:
        """Return the session of this epoch; the rank that speaks for the run takes its lock and its voice.

        Raises
        ------
        InUseError, DiskError
            On the rank that speaks, if the run directory cannot be had.
        """
        assert self.grid is not None
        base = self.base
        if self.role == 0:
            self.console = self.console or Console(base.config.telemetry.console)
            if self.lock is None:
                self.lock = RunLock(base.directory.lock, say=self.console.say)
                open_directory(base.directory, self.lock, self.console.say)
        is_root = self.role == 0 and self.lock is not None
        return replace(
            base,
            config=self.config,
            schedule=self.outline.schedule if self.outline else base.schedule,
            grid=self.grid,
            console=self.console if is_root and self.console else Console("quiet"),
            events=EventLog(base.directory.events, self.lock.check) if is_root and self.lock else EventLog(None),
            lock=self.lock if is_root else None,
        )

    @property
    def speaks(self) -> bool:
        """Whether this process tells what all have to tell: rank 0, or the first one that lives where all leave."""
        return self.speaks_last or self.role == 0

    def speak_last(self, error: HpcpipeError | None) -> None:
        """Choose the first live process to speak, since rank 0 may have died, and let it write how the run ended.

        Parameters
        ----------
        error : HpcpipeError or None
            Why the run ends; None if it is done.
        """
        self.speaks_last = self.crew.rank == 0
        if not self.speaks_last:
            return
        directory = self.base.directory
        # What cannot be written here is for the launcher to say.
        with suppress(HpcpipeError, OSError):
            if self.lock is None:
                self.lock = RunLock(directory.lock)
                self.lock.acquire()
            step = last_step(directory.metrics)
            if error is None and read_status(directory.path).get("state") != "done":
                write_status(directory.path, step, ExitCode.DONE)
            elif error is not None:
                code = int(error.exit_code)
                EventLog(directory.events, self.lock.check).add("stopped", step=step, exit_code=code, cause=str(error))

    def level(self, reached: int) -> int:
        """Return which level of recovery is next, see `hpcpipe.recovery.decide.decide`.

        Parameters
        ----------
        reached : int
            The newest step that a survivor has finished, -1 if that is not known.
        """
        most = self.config.recovery.max_attempts
        if reached > self._reached or self.attempts < most:
            return 0
        return 1 if self.attempts < 2 * most else 2

    def note_recovery(self, reached: int) -> None:
        """Count a recovery; the count begins again when the run has come further than at any recovery before."""
        self.attempts = 1 if reached > self._reached else self.attempts + 1
        self._reached = max(reached, self._reached)
