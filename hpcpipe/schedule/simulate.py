"""Running a schedule against a clock: when each action starts and ends, and what that costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.buffers import peak_stash
from hpcpipe.schedule.clock import needs_of, run
from hpcpipe.schedule.flat import KINDS, Times, flatten
from hpcpipe.schedule.limits import in_flight
from hpcpipe.schedule.shared_cores import run_on_shared_cores


@dataclass(frozen=True)
class Costs:
    """What actions and messages take, in any one unit of time.

    Attributes
    ----------
    forward, backward_input, backward_weight : sequence of float
        One number per stage.
    message : float
        From the end of the sender's action until the receiver may start.
    backward : sequence of float, optional
        What a whole backward takes, where that is not the sum of its halves: recomputed activations serve both.
    """

    forward: Sequence[float]
    backward_input: Sequence[float]
    backward_weight: Sequence[float]
    message: float = 0.0
    backward: Sequence[float] | None = None

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
        times = forward, backward_input, backward_weight
        return cls.even(schedule.num_ranks, schedule.num_stages, *times, message)

    @classmethod
    def even(
        cls,
        num_ranks: int,
        num_stages: int,
        forward: float = 1.0,
        backward_input: float = 1.0,
        backward_weight: float = 1.0,
        message: float = 0.0,
    ) -> "Costs":
        """Return what `uniform` does, for a schedule that is yet to be made."""
        share = num_ranks / num_stages
        stages = range(num_stages)
        return cls(
            [forward * share for _ in stages],
            [backward_input * share for _ in stages],
            [backward_weight * share for _ in stages],
            message,
        )

    def by_kind(self) -> dict[Kind, list[float]]:
        """Return what each kind of compute action takes, one number per stage."""
        halves = [i + w for i, w in zip(self.backward_input, self.backward_weight, strict=True)]
        return {
            Kind.F: list(self.forward),
            Kind.I: list(self.backward_input),
            Kind.W: list(self.backward_weight),
            Kind.B: halves if self.backward is None else list(self.backward),
        }


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes
    ----------
    starts, ends : tuple of tuple of float
        For each rank, when each of its compute actions starts and ends, in the order of its list.
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
    ends: tuple[tuple[float, ...], ...]
    busy: tuple[float, ...]
    makespan: float
    bubble: float
    peak_stash: list[float]
    max_in_flight: int

    @property
    def fill_and_drain(self) -> list[float]:
        """For each rank, the time before its first action and after its last one."""
        return [
            self.makespan - (ends[-1] - starts[0] if starts else 0.0)
            for starts, ends in zip(self.starts, self.ends, strict=True)
        ]

    @property
    def waiting(self) -> list[float]:
        """For each rank, the time that it waits between its first action and its last one."""
        return [
            max(0.0, self.makespan - busy - outside)
            for busy, outside in zip(self.busy, self.fill_and_drain, strict=True)
        ]


def simulate(schedule: Schedule, costs: Costs, cores: float | None = None) -> Timeline:
    """Run a schedule's compute actions in order, each as early as its rank and its input allow.

    Messages are sent without blocking, so a schedule that passes `check` runs to its end.

    Parameters
    ----------
    schedule : Schedule
        Lowered or not; only compute actions and where messages cross ranks matter.
    costs : Costs
        One number per stage and kind.
    cores : float, optional
        Cores that all ranks share, where that is fewer than one each.

    Raises
    ------
    UsageError
        If a rank waits for ever, which `check` would have said.
    """
    flat = flatten(schedule.actions).compute()
    needs = needs_of(schedule, flat)
    waits = needs < len(needs)
    crosses = waits & (flat.rank[np.where(waits, needs, 0)] != flat.rank)
    durations = _table(schedule, costs)[flat.kind, flat.stage]
    delays = np.where(crosses, costs.message, 0.0)
    offsets = flat.offsets.tolist()
    lists = offsets, needs.tolist(), durations.tolist(), delays.tolist()
    if cores is None or cores >= schedule.num_ranks:
        timed = run(*lists)
    else:
        timed = run_on_shared_cores(*lists, cores)
    starts, ends = (np.array(times, np.float64) for times in timed)
    if np.isnan(ends).any():
        rank = int(flat.rank[np.argmax(np.isnan(ends))])
        raise UsageError(f"schedule {schedule.name}: rank {rank} waits for ever, so there is nothing to simulate")

    def per_rank(values: Times) -> list[list[float]]:
        return [values[start:stop].tolist() for start, stop in pairwise(offsets)]

    busy = tuple(map(sum, per_rank(durations)))
    makespan = float(ends.max(initial=0.0))
    if not np.isfinite(makespan):
        raise UsageError(f"schedule {schedule.name}: the times are too large to add up: give them in a larger unit")
    _, counts = in_flight(flat.rank[needs[crosses]], ends[needs[crosses]], starts[crosses])
    return Timeline(
        starts=tuple(map(tuple, per_rank(starts))),
        ends=tuple(map(tuple, per_rank(ends))),
        busy=busy,
        makespan=makespan,
        bubble=makespan - sum(busy) / len(busy),
        peak_stash=peak_stash(schedule),
        max_in_flight=int(counts.max(initial=0)),
    )


def _table(schedule: Schedule, costs: Costs) -> Times:
    """Return what each kind of action takes on each stage, in the order of `KINDS`."""
    table = np.zeros((len(KINDS), schedule.num_stages))
    for kind, row in costs.by_kind().items():
        table[KINDS.index(kind)] = row
    return table
