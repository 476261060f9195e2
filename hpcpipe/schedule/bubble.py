"""Where the bubble comes from: the schedule itself, stages that differ, messages that take time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.simulate import Costs, simulate


@dataclass(frozen=True)
class BubbleParts:
    """Three parts of the idle time, each one number per rank; for each rank they add up to makespan less busy time.

    Attributes
    ----------
    schedule : tuple of float
        Fill and drain, and other waiting that the order of the actions brings with it: the idle time if all stages took
        their mean time, and messages none.
    imbalance : tuple of float
        What the differences between stages add to that; below 0 on a rank that has more to do than the mean.
    messages : tuple of float
        What the time of messages adds to both: as much of it as is not hidden behind compute. Never below 0.
    """

    schedule: tuple[float, ...]
    imbalance: tuple[float, ...]
    messages: tuple[float, ...]

    @property
    def whole(self) -> tuple[float, float, float]:
        """The three parts of the bubble, which is the mean of the idle time over the ranks."""
        num_ranks = len(self.schedule)
        return sum(self.schedule) / num_ranks, sum(self.imbalance) / num_ranks, sum(self.messages) / num_ranks


def split_bubble(schedule: Schedule, costs: Costs) -> BubbleParts:
    """Simulate a schedule three times: with mean costs, with those of each stage, and with messages too.

    Parameters
    ----------
    schedule : Schedule
        Lowered or not.
    costs : Costs
        One number per stage and kind.

    Raises
    ------
    UsageError
        If a rank waits for ever.
    """
    mean = Costs(
        _mean(costs.forward),
        _mean(costs.backward_input),
        _mean(costs.backward_weight),
        backward=None if costs.backward is None else _mean(costs.backward),
    )
    of_schedule = _idle(schedule, mean)
    with_imbalance = _idle(schedule, replace(costs, message=0.0))
    with_messages = _idle(schedule, costs)
    return BubbleParts(
        tuple(of_schedule),
        tuple(more - less for more, less in zip(with_imbalance, of_schedule, strict=True)),
        tuple(more - less for more, less in zip(with_messages, with_imbalance, strict=True)),
    )


def _mean(times: Sequence[float]) -> list[float]:
    return [sum(times) / len(times)] * len(times)


def _idle(schedule: Schedule, costs: Costs) -> list[float]:
    """Return how long each rank is idle in a step."""
    timeline = simulate(schedule, costs)
    return [timeline.makespan - busy for busy in timeline.busy]
