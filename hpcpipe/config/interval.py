"""How often: every so many steps, every so many minutes, or as often as pays off."""

import re
from dataclasses import dataclass

from hpcpipe.config.values import as_toml
from hpcpipe.errors import UsageError

AUTO = "auto"
_UNITS_S = {"second": 1.0, "minute": 60.0, "hour": 3600.0}
_TEXT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(second|minute|hour)s?\s*\Z")


@dataclass(frozen=True)
class Interval:
    """What ``checkpoint.every`` says; at most one of the attributes is set, none for never.

    Attributes
    ----------
    steps : int
        Steps between two checkpoints.
    seconds : float
        Seconds between two checkpoints.
    is_auto : bool
        Whether measured cost and failures decide.
    """

    steps: int = 0
    seconds: float = 0.0
    is_auto: bool = False


def parse_interval(key: str, value: int | str) -> Interval:
    """Read an interval.

    Parameters
    ----------
    key : str
        The key of the configuration, for the message.
    value : int or str
        Steps, ``"15 minutes"`` (seconds, minutes or hours), or ``"auto"``.

    Raises
    ------
    UsageError
        The text is neither, or the time is 0.
    """
    if isinstance(value, int):
        return Interval(steps=value)
    if value == AUTO:
        return Interval(is_auto=True)
    found = _TEXT.match(value)
    seconds = float(found[1]) * _UNITS_S[found[2]] if found else 0.0
    if seconds <= 0:
        raise UsageError(
            f'{key} = {as_toml(value)}: expected a number of steps, a time such as "15 minutes" or "2 hours", or "auto"'
        )
    return Interval(seconds=seconds)
