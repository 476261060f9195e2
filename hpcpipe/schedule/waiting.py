"""How long ranks wait for each other if messages take no time: what order and durations of the actions bring along."""

from collections.abc import Sequence

import numpy as np

from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.clock import needs_of, run
from hpcpipe.schedule.flat import flatten


def waiting_without_messages(schedule: Schedule, durations: Sequence[Sequence[float]]) -> list[float]:
    """Return for each rank how long it waits before its last compute action ends, all ranks starting together.

    Parameters
    ----------
    schedule : Schedule
        One that passes `check`.
    durations : sequence of sequence of float
        What each compute action takes, rank by rank, in the order of its list.
    """
    flat = flatten(schedule.actions).compute()
    taken = [duration for rank in durations for duration in rank]
    _, ends = run(flat.offsets.tolist(), needs_of(schedule, flat).tolist(), taken, [0.0] * len(taken))
    lasts = np.array(ends, np.float64)[flat.offsets[1:] - 1].tolist()
    return [last - sum(rank) for last, rank in zip(lasts, durations, strict=True)]
