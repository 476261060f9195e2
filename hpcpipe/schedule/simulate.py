"""Running a schedule against a clock: when each action starts and ends, and what that costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpcpipe.schedule.action import COMPUTE, Action, Kind, Schedule
from hpcpipe.schedule.buffers import peak_stash
from hpcpipe.schedule.clock import run


@dataclass(frozen=True)
class Costs:
    """What actions and messages take, in any one unit of time.

    Attributes
    ----------
    forward, backward_input, backward_weight : sequence of float
        One number per stage.
    message : float
        From the end of the sender's action until the receiver may start.
    """

    forward: Sequence[float]
    backward_input: Sequence[float]
    backward_weight: Sequence[float]
    message: float = 0.0

    @classmethod
    def uniform(
        cls,
        schedule: Schedule,
        forward: float = 1.0,
        backward_input: float = 1.0,
        backward_weight: float = 1.0,
        message: float = 0.0,
    ) -> "Costs":
        """Return costs of one microbatch through all layers of one rank, shared out evenly over its stages."""
        share = schedule.num_ranks / schedule.num_stages
        stages = range(schedule.num_stages)
        return cls(
            [forward * share for _ in stages],
            [backward_input * share for _ in stages],
            [backward_weight * share for _ in stages],
            message,
        )

    def of(self, action: Action) -> float:
        """Return what a compute action takes."""
        kind, stage, _ = action
        if kind is Kind.F:
            return self.forward[stage]
        if kind is Kind.I:
            return self.backward_input[stage]
        if kind is Kind.W:
            return self.backward_weight[stage]
        return self.backward_input[stage] + self.backward_weight[stage]


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes
    ----------
    starts : tuple of tuple of float
        For each rank, when each of its compute actions starts, in the order of its list.
    busy : tuple of float
        For each rank, the time that it computes.
    makespan : float
        From the first start to the last end.
    bubble : float
        Makespan less the mean of `busy`: what the ranks wait, per rank.
    peak_stash : list of float
        For each rank, in activations of one microbatch through all of its layers.
    max_in_flight : int
        Most messages of one sender that are sent and not yet taken up by their receiver's compute.
    """

    starts: tuple[tuple[float, ...], ...]
    busy: tuple[float, ...]
    makespan: float
    bubble: float
    peak_stash: list[float]
    max_in_flight: int


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Run a schedule's compute actions in order, each as early as its rank and its input allow.

    Messages are sent without blocking, so a schedule that passes `check` runs to its end.

    Parameters
    ----------
    schedule : Schedule
        Lowered or not; only compute actions and where messages cross ranks matter.
    costs : Costs
        One number per stage and kind.
    """
    lists = [[action for action in actions if action.kind in COMPUTE] for actions in schedule.actions]
    starts, ends = run(schedule, lists, costs.forward, costs.backward_input, costs.backward_weight, costs.message)
    busy = tuple(sum(map(costs.of, actions)) for actions in lists)
    makespan = max(max(times, default=0.0) for times in ends)
    return Timeline(
        starts=tuple(map(tuple, starts)),
        busy=busy,
        makespan=makespan,
        bubble=makespan - sum(busy) / len(busy),
        peak_stash=peak_stash(schedule),
        max_in_flight=_max_in_flight(schedule, lists, starts, ends),
    )


def _max_in_flight(
    schedule: Schedule, lists: list[list[Action]], starts: list[list[float]], ends: list[list[float]]
) -> int:
    """Count, per sender, the messages between the end of their action and the start of the one that takes them."""
    taken: dict[tuple[bool, int, int], float] = {}
    for actions, times in zip(lists, starts, strict=True):
        for (kind, stage, k), start in zip(actions, times, strict=True):
            if kind is not Kind.W:
                taken[kind is Kind.F, stage, k] = start
    most = 0
    for actions, times in zip(lists, ends, strict=True):
        changes: list[tuple[float, int]] = []
        for (kind, stage, k), end in zip(actions, times, strict=True):
            is_forward = kind is Kind.F
            crosses = schedule.output_crosses(stage) if is_forward else schedule.input_crosses(stage)
            if kind is not Kind.W and crosses:
                changes += [(end, 1), (taken[is_forward, stage + (1 if is_forward else -1), k], -1)]
        live = 0
        # A message that is taken up at the moment it is sent is not in flight.
        for _, change in sorted(changes):
            live += change
            most = max(most, live)
    return most
