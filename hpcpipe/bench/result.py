"""What a benchmark on ranks comes to."""

from dataclasses import dataclass
from typing import Any

from hpcpipe.errors import ExitCode


@dataclass(frozen=True)
class BenchResult:
    """How a benchmark ended on this rank.

    Attributes
    ----------
    code : ExitCode
        The process's.
    report : dict or None
        What was measured, ready for JSON; None on ranks that do not speak, or after an error that has been told.
    """

    code: ExitCode
    report: dict[str, Any] | None
