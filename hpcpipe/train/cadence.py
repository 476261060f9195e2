"""When a checkpoint is due: after so many steps, after some time, or as often as pays off."""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from hpcpipe.config.interval import Interval

NODE_MTBF_S = 6300 * 3600.0
"""Mean time between failures of a node before anything is known of it: Llama 3's 419 unexpected interruptions in 54
days on 2,048 nodes (Llama Team, The Llama 3 Herd of Models, 2024, section 3.3.4)."""

_SHORTEST_S, _LONGEST_S = 30.0, 3600.0


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the time between checkpoints that loses least.

    The first-order optimum of Young (1974) and Daly (2006): the square root of twice the cost times the mean time
    between failures; not below 30 s, and not above an hour, which is more than most want to see lost.

    Parameters
    ----------
    cost_s : float
        By which a checkpoint makes training longer.
    mtbf_s : float
        Mean time between failures of the whole run.
    """
    return min(_LONGEST_S, max(_SHORTEST_S, math.sqrt(2.0 * cost_s * mtbf_s)))


def estimate_mtbf_s(num_nodes: int, events: Sequence[dict[str, Any]]) -> float:
    """Estimate the mean time between failures of a run.

    The expectation for its nodes counts as one failure seen, and what happened to the run so far is added: the time
    from each start to its last event, and as a failure each start that was followed by neither an end nor a stop.

    Parameters
    ----------
    num_nodes : int
        Nodes that the ranks run on.
    events : sequence of dict
        Of ``events.jsonl``, in order.
    """
    starts: list[list[dict[str, Any]]] = []
    for event in events:
        if event.get("event") == "started":
            starts.append([])
        if starts:
            starts[-1].append(event)
    # The last start may be this one.
    num_failures = sum(start[-1].get("event") not in ("done", "stopped") for start in starts[:-1])
    trained_s = sum(max(0.0, _seconds(start[-1]) - _seconds(start[0])) for start in starts)
    return (NODE_MTBF_S / num_nodes + trained_s) / (1 + num_failures)


def _seconds(event: dict[str, Any]) -> float:
    """Return the time of day of an event, 0 where it has none."""
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0


class Cadence:
    """Says when the next checkpoint is due.

    Parameters
    ----------
    interval : Interval
        What the configuration says.
    mtbf_s : float
        Mean time between failures, for an interval that measured cost decides.
    now_s : float
        A clock that does not jump.
    """

    def __init__(self, interval: Interval, mtbf_s: float, now_s: float) -> None:
        self._interval = interval
        self._mtbf_s = mtbf_s
        self._last_s = now_s
        self.seconds = best_interval_s(0.0, mtbf_s) if interval.is_auto else interval.seconds

    def describe(self) -> str:
        """Say how often, in a clause."""
        if self._interval.steps:
            return f"every {self._interval.steps} steps"
        if self._interval.is_auto:
            hours = self._mtbf_s / 3600.0
            return f"as often as pays off with a failure every {hours:,.0f} hours, now every {self.seconds:.0f} s"
        return f"every {self.seconds:g} s" if self.seconds else "at the end only"

    def is_due_by_time(self, now_s: float) -> bool:
        """Return whether the time since the last checkpoint was long enough; never where steps are counted."""
        return self.seconds > 0 and now_s - self._last_s >= self.seconds

    def is_due_by_step(self, step: int) -> bool:
        """Return whether a step is one after which a checkpoint is due."""
        return self._interval.steps > 0 and step % self._interval.steps == 0

    def took(self, now_s: float) -> None:
        """Count the time from here on."""
        self._last_s = now_s

    def learn(self, cost_s: float) -> None:
        """Take the measured cost of a checkpoint into account."""
        if self._interval.is_auto:
            self.seconds = best_interval_s(cost_s, self._mtbf_s)


class Costs:
    """By how much steps take longer while a checkpoint is being written."""

    def __init__(self) -> None:
        self._usual_s, self._slowdown_s = 0.0, 0.0

    def add(self, step_s: float, is_writing: bool) -> None:
        """Count a step."""
        if is_writing:
            self._slowdown_s += step_s - self._usual_s if self._usual_s else 0.0
        else:
            self._usual_s += (step_s - self._usual_s) * (0.1 if self._usual_s else 1.0)

    def take_slowdown_s(self) -> float:
        """Return the seconds lost since the last call."""
        slowdown_s, self._slowdown_s = max(0.0, self._slowdown_s), 0.0
        return slowdown_s
