"""Every error that hpcpipe raises for a person to read, each with the exit code of its kind."""

from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """Exit codes of the ``hpcpipe`` command; the same number stands in ``status.json``."""

    DONE = 0
    USAGE = 64
    DAMAGED = 65
    NUMERICS = 70
    RANK_FAILED = 71
    IN_USE = 73
    DISK = 74
    STOPPED = 75


MEANING: dict[ExitCode, str] = {
    ExitCode.DONE: "done",
    ExitCode.USAGE: "usage or configuration is wrong",
    ExitCode.DAMAGED: "data or checkpoint is damaged",
    ExitCode.NUMERICS: "numbers went wrong (NaN or Inf)",
    ExitCode.RANK_FAILED: "a rank failed and could not be replaced",
    ExitCode.IN_USE: "the run directory is in use by another run",
    ExitCode.DISK: "the disk is full, read-only or failing",
    ExitCode.STOPPED: "stopped before the end: run the same command again",
}


class HpcpipeError(Exception):
    """An error whose text names the key or file, the numbers, and the cure.

    Attributes
    ----------
    exit_code : ExitCode
        What the process returns when nothing catches the error.
    on_all_ranks : bool
        Whether every rank raised it, so that they can leave together; else one rank has to end the others.
    """

    exit_code = ExitCode.RANK_FAILED
    on_all_ranks = False

    def on_all(self) -> Self:
        """Note that every rank raises it, and return it."""
        self.on_all_ranks = True
        return self


class UsageError(HpcpipeError):
    """A command line or a configuration that cannot be carried out."""

    exit_code = ExitCode.USAGE


class DamagedError(HpcpipeError):
    """A token file or checkpoint that is missing, truncated, altered, or of another kind."""

    exit_code = ExitCode.DAMAGED


class NumericsError(HpcpipeError):
    """A loss or gradient that is not a finite number."""

    exit_code = ExitCode.NUMERICS


class RankError(HpcpipeError):
    """A rank that failed, or did not answer before its deadline."""

    exit_code = ExitCode.RANK_FAILED


class InUseError(HpcpipeError):
    """A run directory that another run holds."""

    exit_code = ExitCode.IN_USE


class DiskError(HpcpipeError):
    """A write that the file system refused."""

    exit_code = ExitCode.DISK


class StoppedError(HpcpipeError):
    """A run that was asked to stop, and wrote what it needs to go on.

    Attributes
    ----------
    by : str
        ``signal``, ``halt`` (a file in the run directory) or ``allocation`` (its end); empty if that is not known.
    """

    exit_code = ExitCode.STOPPED
    by = ""


class Interruption(Exception):
    """Makes ranks leave what they are doing, meet, and go on from copies of their state; see docs/recovery.md.

    One rank raises it, or all do. The others learn of it because their communication ends with an error.

    Parameters
    ----------
    cause : str
        Why, as a clause for people.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Rewind(Interruption):
    """Makes ranks go back to an earlier step; all ranks raise it.

    Parameters
    ----------
    cause : str
        Why, as a clause for people.
    to_step : int
        They go on from the newest checkpoint of this step or an earlier one, or from the start if there is none.
    """

    def __init__(self, cause: str, to_step: int) -> None:
        super().__init__(cause)
        self.to_step = to_step


BY_CODE: dict[int, type[HpcpipeError]] = {
    int(kind.exit_code): kind
    for kind in (UsageError, DamagedError, NumericsError, RankError, InUseError, DiskError, StoppedError)
}
