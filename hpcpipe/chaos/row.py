"""What a row of the fault matrix says: the run, the fault, and what must be seen."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from hpcpipe.errors import ExitCode

FIRST_STEP = 6
_STEPS = range(3, 16)

FULL_DISK = "full"
"""Folder below that of a run in which a row has mounted a disk without space."""

KINDS_OF_BITS = ("same", "restart", "twin", "none")


@dataclass(frozen=True)
class Event:
    """An event that ``events.jsonl`` must have.

    Attributes
    ----------
    name : str
        Value of ``event``.
    cause : str
        Must be in its ``cause``, in whatever case.
    max_lost_steps : int or None
        The most that its ``lost_steps`` may say.
    max_s : float or None
        The most that its ``seconds`` may say.
    at_least : int
        How many such events there must be.
    """

    name: str
    cause: str = ""
    max_lost_steps: int | None = None
    max_s: float | None = None
    at_least: int = 1


@dataclass(frozen=True)
class Act:
    """Something that is done to the run from outside.

    Attributes
    ----------
    do : str
        Name of a signal, or ``remove`` or ``fill`` (a file of the run directory: is on `FULL_DISK` from then on).
    to : str
        ``launch``, ``mpirun``, ``supervisor``, ``process N`` or ``writer N`` (beside a process); or the file's name.
    step : int or None
        Is done once metrics have this step; None: the step of the repetition.
    """

    do: str
    to: str
    step: int | None = None


@dataclass(frozen=True)
class Expected:
    """What must be seen.

    Attributes
    ----------
    text : str
        For the table.
    code : int
        Exit code of the command, and of ``status.json``.
    bits : str
        ``same``: weights, moments and metrics are those of a run without a fault; ``restart``: they are after the
        same command was run once more without the fault; ``twin``: those of the row's twin; ``none``: not compared.
    events : tuple of Event
        Must be there.
    absent : tuple of str
        Events that must not be there.
    told : tuple of str
        Must be in the output of the command, in whatever case.
    keeps_metrics : bool
        Whether ``metrics.jsonl`` must be whole; not where the fault is its loss.
    max_end_s : float or None
        The most seconds from the last act until the end of the command.
    """

    text: str
    code: int = ExitCode.DONE
    bits: str = "same"
    events: tuple[Event, ...] = ()
    absent: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    keeps_metrics: bool = True
    max_end_s: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of the matrix, or one of its cases.

    Attributes
    ----------
    name : str
        Number of the row, and behind a dot the case.
    fault, when : str
        For the table.
    expected : Expected
        What must be seen.
    inject : str
        ``HPCPIPE_FAULT``, in which ``{step}``, ``{microbatch}`` and ``{seed}`` stand for those of the repetition, and
        ``{before}`` and ``{after}`` for the step before and the fourth behind.
    acts : tuple of Act
        What is done from outside.
    pipeline, data, spares : int
        The grid, and the ranks beside it.
    settings : tuple of str
        ``section.key=value`` that are not as in other rows, with the same places.
    environ : mapping
        Variables.
    options : tuple of str
        Of ``hpcpipe launch``.
    twin : str
        ``HPCPIPE_FAULT`` of a run on one rank that must end with the same bits, with the same places.
    before : str
        Shell commands before the launch, in the same shell; ``$HPCPIPE_CHAOS_FOLDER`` is a folder of the run's own.
    is_alone : bool
        Whether the shell runs in a mount namespace of its own.
    limit_s : float
        Seconds until the run must have ended by itself.
    is_slow : bool
        Whether it runs only when it is named.
    """

    name: str
    fault: str
    when: str
    expected: Expected
    inject: str = ""
    acts: tuple[Act, ...] = ()
    pipeline: int = 4
    data: int = 1
    spares: int = 0
    settings: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    twin: str = ""
    before: str = ""
    is_alone: bool = False
    limit_s: float = 60.0
    is_slow: bool = False

    @property
    def number(self) -> int:
        """The number of the row in the matrix."""
        return int(self.name.partition(".")[0])


@dataclass(frozen=True)
class Repetition:
    """What differs between repetitions of a row.

    Attributes
    ----------
    index : int
        From 0 on.
    step, microbatch, seed : int
        Where the fault happens; those of the first are always the same.
    """

    index: int
    step: int = FIRST_STEP
    microbatch: int = 1
    seed: int = 0

    @classmethod
    def of(cls, row: Row, index: int, num_microbatches: int) -> "Repetition":
        """Return a repetition of a row; the same places each time that it is asked for."""
        if index == 0:
            return cls(0)
        numbers = random.Random(f"{row.name} {index}")
        return cls(index, numbers.choice(_STEPS), numbers.randrange(num_microbatches // row.data), index)

    def fill(self, text: str) -> str:
        """Put the numbers of this repetition into a text."""
        steps = {"before": self.step - 1, "step": self.step, "after": self.step + 4}
        return text.format(**steps, microbatch=self.microbatch, seed=self.seed)
