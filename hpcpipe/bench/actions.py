"""``hpcpipe bench actions``: what the executor costs per action, alone or on ranks that were started together."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpcpipe.bench.result import BenchResult
from hpcpipe.cluster.environment import rank_hint
from hpcpipe.errors import ExitCode, UsageError
from hpcpipe.mpi import runtime
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import barrier, gather_rows
from hpcpipe.mpi.runtime import World
from hpcpipe.mpi.wait import Waiter
from hpcpipe.pipeline.action_cost import POLL, InstantTransport, measure
from hpcpipe.pipeline.messages import Messages
from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.build import build
from hpcpipe.train.leave import leaving_together

_ALONE = 4
_TIMEOUT_S = 60.0
_KINDS = (*map(str, Kind), POLL)


def bench_actions(names: Sequence[str], num_ranks: int | None, num_microbatches: int, repetitions: int) -> BenchResult:
    """Measure what the executor itself costs per action, compute, copies and waiting left out.

    Alone, one process walks the lists of all ranks one after the other, with messages that are there at once. On
    several ranks each walks its own, with real messages.

    Parameters
    ----------
    names : sequence of str
        Schedules.
    num_ranks : int or None
        Ranks of the pipeline; None for as many as were started, or 4 for a process on its own.
    num_microbatches : int
        Microbatches of a step, at least 1.
    repetitions : int
        Walks of each list, at least 1.

    Returns
    -------
    BenchResult
        Its report has ``benchmark transport ranks microbatches repetitions schedules``; each schedule has ``schedule
        stages actions``, microseconds per action ``action_us`` (the median of the repetitions), ``p10_us`` and
        ``p90_us``, and ``kinds``, the median microseconds of each kind of action and of one ``poll``.

    Raises
    ------
    UsageError
        If there is no such schedule for these numbers, or not as many ranks were started.
    """
    hint = rank_hint()
    if hint is None or hint[1] == 1:
        schedules = _build(names, _ALONE if num_ranks is None else num_ranks, num_microbatches, repetitions)
        rows = [_measure_alone(schedule, repetitions) for schedule in schedules]
        return BenchResult(ExitCode.DONE, _report("none", schedules[0], repetitions, rows))
    world = runtime.start()
    report = None
    with leaving_together(world, None) as outcome:
        waiter = Waiter(_TIMEOUT_S, owns_core=world.owns_core)
        with together(world.comm, waiter):
            world.bind(num_threads=1)
            if num_ranks not in (None, world.size):
                raise UsageError(f"--ranks {num_ranks}, but {world.size} ranks were started: leave --ranks out")
            schedules = _build(names, world.size, num_microbatches, repetitions)
        rows = [_measure_on_ranks(schedule, world, waiter, repetitions) for schedule in schedules]
        if world.rank == 0:
            report = _report("mpi", schedules[0], repetitions, rows)
    runtime.stop(world)
    return BenchResult(outcome.code, report)


def _build(names: Sequence[str], num_ranks: int, num_microbatches: int, repetitions: int) -> list[Schedule]:
    if repetitions < 1:
        raise UsageError(f"--repetitions {repetitions}: at least 1 is needed")
    return [build(name, num_ranks, num_microbatches) for name in names]


def _measure_alone(schedule: Schedule, repetitions: int) -> dict[str, Any]:
    cost = measure(schedule, list(range(schedule.num_ranks)), InstantTransport(), repetitions)
    return _row(schedule, cost.action_s, {kind: float(np.median(spent)) for kind, spent in cost.spent_s.items()})


def _measure_on_ranks(schedule: Schedule, world: World, waiter: Waiter, repetitions: int) -> dict[str, Any]:
    """Return the mean over ranks of what each of them takes."""
    messages = Messages(Channel(world.comm, waiter, MessageMode()), schedule)

    def meet() -> None:
        barrier(world.comm, waiter)

    cost = measure(schedule, [world.rank], messages, repetitions, lambda: waiter.waited_s, meet)
    # The ends of the pipeline have fewer kinds of messages.
    medians = np.array([np.median(cost.spent_s[kind]) if kind in cost.spent_s else np.nan for kind in _KINDS])
    action_s = gather_rows(world.comm, waiter, np.array(cost.action_s)).mean(axis=0)
    columns = gather_rows(world.comm, waiter, medians).T
    kinds = {
        kind: float(np.nanmean(column))
        for kind, column in zip(_KINDS, columns, strict=True)
        if not np.isnan(column).all()
    }
    return _row(schedule, action_s.tolist(), kinds)


def _row(schedule: Schedule, action_s: Sequence[float], kinds: Mapping[str, float]) -> dict[str, Any]:
    low, median, high = (float(1e6 * figure) for figure in np.percentile(action_s, (10, 50, 90)))
    return {
        "schedule": schedule.name,
        "stages": schedule.num_stages,
        "actions": sum(map(len, schedule.actions)),
        "action_us": median,
        "p10_us": low,
        "p90_us": high,
        "kinds": {kind: 1e6 * kinds[kind] for kind in _KINDS if kind in kinds},
    }


def _report(transport: str, schedule: Schedule, repetitions: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": "actions",
        "transport": transport,
        "ranks": schedule.num_ranks,
        "microbatches": schedule.num_microbatches,
        "repetitions": repetitions,
        "schedules": rows,
    }
