"""The plan of a run: costs, partition, schedule and what a step should take, decided before anything is allocated."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpcpipe.cluster.processor import memory
from hpcpipe.config.dump import to_toml
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.pipeline.stage import Stage
from hpcpipe.schedule.csv_file import write_csv
from hpcpipe.telemetry.files import write_whole
from hpcpipe.train.choose import AUTO, GREEDY, Candidate, Choice, choose_schedule, plan_greedy, plan_schedule
from hpcpipe.train.costs import MeasuredCosts, cache_path, keep_costs, observed_costs, obtain_costs
from hpcpipe.train.predict import cores_of_pipeline, predict_step
from hpcpipe.train.session import Session

_VERSION = 1
_SHOWN = 6
_ENOUGH_STEPS = 10
_MOST_OVERHEAD = 1.25


@dataclass(frozen=True)
class Plan:
    """What a run will do, the same on every rank.

    Attributes
    ----------
    candidate : Candidate
        Configuration, schedule and prediction.
    choice : Choice or None
        What it was chosen from, where the schedule was ``auto``.
    measured : MeasuredCosts
        What the prediction was made from.
    cores : float or None
        Cores that the ranks of a pipeline share; None if each has its own.
    """

    candidate: Candidate
    choice: Choice | None
    measured: MeasuredCosts
    cores: float | None


def make_plan(session: Session) -> Plan:
    """Decide what is left open: the partition, and the schedule where it is ``auto``; predict the step.

    Parameters
    ----------
    session : Session
        All ranks take part. Its configuration and schedule are replaced by the decided ones.

    Raises
    ------
    UsageError
        On every rank, if ``auto`` finds no schedule that can run.
    """
    config, grid, waiter = session.config, session.grid, session.waiter
    measured = obtain_costs(config, grid, waiter, session.num_local_ranks, session.team)
    own_cores = cores_of_pipeline(config, session.num_local_ranks, session.num_local_cores)
    limit_bytes, cores = _agree(session, memory().available_bytes / session.num_local_ranks, own_cores)
    candidate, choice = None, None
    if config.parallel.schedule == AUTO:
        session.console.say("schedule auto: simulating what could run")
    with together(grid.comm, waiter):
        if config.parallel.schedule == AUTO:
            choice = choose_schedule(config, measured, cores, limit_bytes)
            candidate = choice.chosen
        elif config.parallel.schedule == GREEDY:
            candidate = plan_greedy(config, measured, cores)
        else:
            candidate = plan_schedule(config, session.schedule, measured, cores)
    assert candidate is not None
    session.config, session.schedule = candidate.config, candidate.schedule
    if choice is not None:
        session.console.say(explain(choice))
    return Plan(candidate, choice, measured, cores)


def _agree(session: Session, limit_bytes: float, cores: float | None) -> tuple[float, float | None]:
    """Return the least memory and cores of all ranks, since ranks that plan with other numbers choose otherwise."""
    own = np.array([limit_bytes, math.inf if cores is None else cores])
    limit_bytes, least = gather_rows(session.grid.comm, session.waiter, own).min(axis=0).tolist()
    return limit_bytes, None if math.isinf(least) else least


def write_plan(session: Session, plan: Plan) -> None:
    """Write ``config.toml``, ``prediction.json`` and ``schedule.csv``, on rank 0; every rank calls it.

    Raises
    ------
    DiskError
        On every rank, if the files could not be written.
    """
    with together(session.grid.comm, session.waiter):
        if session.is_root:
            directory = session.directory
            write_whole(directory.prediction, json.dumps(_to_dict(plan), indent=2) + "\n")
            write_whole(directory.schedule, write_csv(plan.candidate.schedule))
            write_whole(directory.config, to_toml(plan.candidate.config))


def describe_plan(plan: Plan) -> str:
    """Say where the model is cut, and what a step should take."""
    prediction = plan.candidate.prediction
    bubble = prediction.timeline.bubble / prediction.timeline.makespan
    blocks = ", ".join(map(str, plan.candidate.config.parallel.partition))
    return f"predicted: {prediction.step_s:.3g} s per step, bubble {bubble:.1%}; blocks per stage: {blocks}"


def compare_with_prediction(
    session: Session, plan: Plan, steps_s: Sequence[float], stages: Mapping[int, Stage]
) -> None:
    """Say on rank 0, and keep in ``events.jsonl``, how the median step compares with the prediction.

    What the layers took goes to the cache of costs, and the schedule that ran is simulated with it too, which tells a
    machine that has become slower from a schedule that waits longer than it should. Fewer than ten steps are not
    compared. All ranks take part.

    Parameters
    ----------
    session : Session
        The run.
    plan : Plan
        What it was planned with.
    steps_s : sequence of float
        Seconds of each step.
    stages : mapping of int to Stage
        What computed on this rank, of `TimedLayer`.
    """
    if len(steps_s) < _ENOUGH_STEPS:
        return
    config, schedule = plan.candidate.config, plan.candidate.schedule
    observed = observed_costs(plan.measured, config, schedule, stages, session.grid, session.waiter)
    if observed is None:
        return
    measured_s, predicted_s = statistics.median(steps_s), plan.candidate.prediction.step_s
    explained_s = predict_step(config, schedule, observed, plan.cores).step_s
    overhead = min(max(1.0, measured_s / explained_s), _MOST_OVERHEAD)
    keep_costs(cache_path(config, session.num_local_ranks), replace(observed, overhead=overhead))
    session.events.add("step time", predicted_s=predicted_s, measured_s=measured_s, explained_s=explained_s)
    session.console.say(
        f"step time: {measured_s:.3g} s measured (median of {len(steps_s)}), {predicted_s:.3g} s predicted"
        f" ({measured_s / predicted_s - 1:+.1%}), {explained_s:.3g} s by what the layers took in this run"
    )


def explain(choice: Choice) -> str:
    """Say what was chosen, beside what else there was."""
    lines = ["schedule auto: simulated with measured costs, seconds per step, bubble, memory per rank"]
    lines += [
        f"  {'>' if candidate is choice.chosen else ' '} {candidate.label:<26}{candidate.prediction.step_s:>9.4g}"
        f"{candidate.prediction.timeline.bubble / candidate.prediction.timeline.makespan:>8.1%}"
        f"{candidate.memory_bytes / 2**20:>9,.0f} MiB"
        for candidate in _shown(choice)
    ]
    return "\n".join(lines)


def _shown(choice: Choice) -> list[Candidate]:
    """Return the fastest candidates, and the chosen one among them."""
    shown = list(choice.ranking[:_SHOWN])
    return shown if choice.chosen in shown else [*shown[:-1], choice.chosen]


def _to_dict(plan: Plan) -> dict[str, Any]:
    choice = plan.choice
    return {
        "version": _VERSION,
        **_facts(plan.candidate),
        "cores": plan.cores,
        "costs": plan.measured.to_dict(),
        "costs_from_cache": plan.measured.from_cache,
        "candidates": [_facts(candidate) for candidate in choice.ranking] if choice else [],
        "refused": choice.refused if choice else {},
    }


def _facts(candidate: Candidate) -> dict[str, Any]:
    parallel, prediction = candidate.config.parallel, candidate.prediction
    return {
        "schedule": parallel.schedule,
        "chunks": parallel.chunks,
        "stash": candidate.stash,
        "partition": list(parallel.partition),
        "step_s": prediction.step_s,
        "pipeline_s": prediction.pipeline_s,
        "update_s": prediction.update_s,
        "exchange_s": prediction.exchange_s,
        "bubble": prediction.timeline.bubble / prediction.timeline.makespan,
        "peak_stash": prediction.timeline.peak_stash,
        "memory_bytes": candidate.memory_bytes,
    }
