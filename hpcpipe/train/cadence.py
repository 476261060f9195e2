"""When a checkpoint is due: after so many steps, after some time, or as often as pays off."""

import math
from collections.abc import Sequence
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

    The expectation for its nodes counts as one failure seen, and what happened to the run so far is added. A start
    that was followed by neither an end nor a stop counts as a failure.

    Parameters
    ----------
    num_nodes : int
        Nodes that the ranks run on.
    events : sequence of dict
        Of ``events.jsonl``, in order.
    """
    expected_s = NODE_MTBF_S / num_nodes
    num_failures, trained_s = 0, 0.0
    is_running = False
    for event in events:
        if event.get("event") == "started":
            num_failures += is_running
            is_running = True
        elif event.get("event") in ("done", "stopped"):
            is_running = False
        seconds = event.get("trained_s")
        trained_s += seconds if isinstance(seconds, int | float) else 0.0
    return (expected_s + trained_s) / (1 + num_failures)


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
