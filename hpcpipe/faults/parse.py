"""Reads ``HPCPIPE_FAULT``: which faults to inject, on which process, and when."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from hpcpipe.errors import UsageError

VARIABLE = "HPCPIPE_FAULT"

PHASES = (
    "setup",
    "step",
    "forward",
    "backward",
    "reduce",
    "agree",
    "update",
    "updated",
    "evaluate",
    "checkpoint",
    "committed",
    "idle",
    "revoke",
    "shrink",
    "exchange",
    "decide",
    "form",
    "restore",
    "commit",
)
"""Where a program asks for faults: parts of a step, of checkpoints, of a spare's life, and steps of a recovery."""

DATA = ("weight", "moment", "activation", "gradient", "message", "copy")
"""What a program offers to be damaged: what is called a gradient is one of weights, summed over microbatches."""

DAMAGE = ("nan", "inf", "flip")
"""Kinds of faults that damage data, and need to be told which."""

KINDS = ("kill", "stop", "spin", "slow", "raise", "memory", "files", "exit", "clock", "wrongtag", *DAMAGE)


@dataclass(frozen=True)
class Fault:
    """One fault, and when it fires.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    text : str
        As it was written.
    process : int or None
        Number of the process in the first world communicator, which it keeps for ever; None: any process.
    rank : int or None
        Its place in the grid, which a spare may take over; None: any place.
    first_step, last_step : int or None
        The steps; None: any step.
    phase : str or None
        One of `PHASES`; None: any, or none for faults of data.
    data : str or None
        One of `DATA` for faults of data, else None.
    microbatch : int or None
        None: any microbatch.
    after_s : float or None
        Seconds since the start of the process; without another condition a kill or stop comes at that moment,
        whatever the process does.
    probability : float
        With which it fires where its conditions hold.
    times : float
        How often it fires in a process; infinity: always.
    seconds : float or None
        After how many seconds a stopped process goes on; None: never.
    factor : float
        How much longer a slowed process computes.
    shift_s : float
        Seconds that the time of day jumps.
    code : int
        What a process exits with.
    bit : int or None
        The bit that is flipped, 0 the lowest; None: one of the exponent.
    seed : int
        Of random choices.
    """

    kind: str
    text: str
    process: int | None = None
    rank: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    phase: str | None = None
    data: str | None = None
    microbatch: int | None = None
    after_s: float | None = None
    probability: float = 1.0
    times: float = 1
    seconds: float | None = None
    factor: float = 3.0
    shift_s: float = 3600.0
    code: int = 1
    bit: int | None = None
    seed: int = 0

    @property
    def is_timed(self) -> bool:
        """Whether it needs no place in the program: a signal that comes at a moment."""
        places = (self.first_step, self.phase, self.microbatch, self.rank)
        return self.kind in ("kill", "stop") and self.after_s is not None and all(place is None for place in places)

    def is_in(self, step: int | None) -> bool:
        """Tell whether a step is among its steps; None: no step is under way."""
        if self.first_step is None or self.last_step is None:
            return True
        return step is not None and self.first_step <= step <= self.last_step


def parse(text: str) -> tuple[Fault, ...]:
    """Read faults as they stand in ``HPCPIPE_FAULT``: ``kind:key=value:...``, several separated by ``;``.

    Parameters
    ----------
    text : str
        Such as ``kill:process=2:step=5:phase=forward:microbatch=1``; empty: no faults.

    Raises
    ------
    UsageError
        Names the part that cannot be read.
    """
    return tuple(_parse_one(part.strip()) for part in text.split(";") if part.strip())


def _parse_one(text: str) -> Fault:
    kind, *parts = (part.strip() for part in text.split(":"))
    if kind not in KINDS:
        raise _refuse(text, f"no fault {kind!r}; {_nearest(kind, KINDS)}")
    values: dict[str, Any] = {}
    for part in parts:
        key, is_given, value = part.partition("=")
        if key not in _KEYS or not is_given:
            raise _refuse(text, f"{part!r} is no condition; {_nearest(key, tuple(_KEYS))}, as key=value")
        try:
            found = _KEYS[key](value)
        except ValueError as error:
            raise _refuse(text, f"{part!r}: {error}") from error
        if found.keys() & values.keys():
            raise _refuse(text, f"{key!r} is given twice")
        values |= found
    if kind == "slow":
        values.setdefault("times", math.inf)
    fault = Fault(kind, text, **values)
    if kind in DAMAGE and fault.data is None:
        raise _refuse(text, f"say what to damage, as in=WHAT with one of {', '.join(DATA)}")
    if kind not in DAMAGE and fault.data is not None:
        raise _refuse(text, f"'in' is for {', '.join(DAMAGE)}; where a process meets {kind!r} is its 'phase'")
    if (kind in DAMAGE or kind == "wrongtag") and fault.phase is not None:
        raise _refuse(text, f"'phase' is not for {kind!r}, which has a place of its own")
    return fault


def _refuse(text: str, problem: str) -> UsageError:
    return UsageError(f"{VARIABLE}: '{text}': {problem}")


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def _whole(name: str) -> Callable[[str], dict[str, Any]]:
    """Return a reader of a whole number that is not negative."""

    def read(text: str) -> dict[str, Any]:
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError("not a whole number from 0 on")
        return {name: int(text)}

    return read


def _number(name: str, highest: float = math.inf) -> Callable[[str], dict[str, Any]]:
    """Return a reader of a number from 0 on."""

    def read(text: str) -> dict[str, Any]:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or float(text) > highest:
            raise ValueError("not a number from 0 on" if highest == math.inf else f"not a number from 0 to {highest:g}")
        return {name: float(text)}

    return read


def _signed(name: str) -> Callable[[str], dict[str, Any]]:
    """Return a reader of a number that may be negative."""

    def read(text: str) -> dict[str, Any]:
        sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text)
        return {name: sign * _number(name)(rest)[name]}

    return read


def _word(name: str, known: tuple[str, ...]) -> Callable[[str], dict[str, Any]]:
    """Return a reader of one of several words."""

    def read(text: str) -> dict[str, Any]:
        if text not in known:
            raise ValueError(_nearest(text, known))
        return {name: text}

    return read


def _steps(text: str) -> dict[str, Any]:
    """Read a step, or the first and the last of several."""
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    if not found:
        raise ValueError("neither a step, such as 5, nor several, such as 10-30")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ValueError(f"step {last} comes before step {first}")
    return {"first_step": first, "last_step": last}


def _times(text: str) -> dict[str, Any]:
    """Read how often; 0: always."""
    number = _whole("times")(text)["times"]
    return {"times": number or math.inf}


_KEYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "process": _whole("process"),
    "rank": _whole("rank"),
    "step": _steps,
    "phase": _word("phase", PHASES),
    "in": _word("data", DATA),
    "microbatch": _whole("microbatch"),
    "after": _number("after_s"),
    "probability": _number("probability", 1.0),
    "times": _times,
    "seconds": _number("seconds"),
    "factor": _number("factor"),
    "shift": _signed("shift_s"),
    "code": _whole("code"),
    "bit": _whole("bit"),
    "seed": _whole("seed"),
}
