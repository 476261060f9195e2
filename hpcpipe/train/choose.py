"""Choosing partition and schedule: every candidate is simulated with measured costs, and the fastest that fits wins."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hpcpipe.config.check import check_stages
from hpcpipe.config.schema import Config
from hpcpipe.errors import UsageError
from hpcpipe.model.partition import balance_blocks
from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.build import GENERATORS, build
from hpcpipe.train.costs import MeasuredCosts
from hpcpipe.train.footprint import predict_largest_bytes
from hpcpipe.train.predict import Prediction, predict_step, stage_costs

AUTO = "auto"
PLAIN = "1f1b"
FORWARD = "forward"
GREEDY = "greedy"
_WORTH = 0.01
_EQUAL = 0.002
_CHUNKS = (2, 3, 4, 8)
_MOST_FOR_GREEDY = 1 << 14


@dataclass(frozen=True)
class Candidate:
    """A schedule with its partition, and what it would take.

    Attributes
    ----------
    config : Config
        With schedule, chunks and partition filled in.
    schedule : Schedule
        Lowered and checked.
    prediction : Prediction
        By simulation.
    memory_bytes : int
        Of the rank that needs most.
    stash : int
        Microbatches that each rank of ``greedy`` may stash, 0 for as many as there are ranks.
    """

    config: Config
    schedule: Schedule
    prediction: Prediction
    memory_bytes: int
    stash: int = 0

    @property
    def label(self) -> str:
        """The schedule's name, and what else was chosen."""
        return _label(self.config, self.stash)


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes
    ----------
    chosen : Candidate
        What runs.
    ranking : tuple of Candidate
        All that fit, the fastest first.
    refused : dict of str to str
        Why others were not considered.
    """

    chosen: Candidate
    ranking: tuple[Candidate, ...]
    refused: dict[str, str]


def plan_schedule(config: Config, schedule: Schedule, measured: MeasuredCosts, cores: float | None) -> Candidate:
    """Partition the model for a given schedule, and predict its step.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.
    schedule : Schedule
        Lowered and checked.
    measured : MeasuredCosts
        Of layers and messages.
    cores : float or None
        Cores that the ranks of a pipeline share; None if each has its own.
    """
    return _predicted(_cut_by_costs(config, schedule.num_stages, measured), schedule, measured, cores)


def plan_greedy(config: Config, measured: MeasuredCosts, cores: float | None, stash: int = 0) -> Candidate:
    """Partition the model, make ``greedy`` for the costs of the partition, and predict its step.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary and the number of chunks.
    measured, cores
        As for `plan_schedule`.
    stash : int
        Microbatches that a rank may stash; 0 for as many as there are ranks.

    Raises
    ------
    UsageError
        If the schedule is not defined for these numbers.
    """
    parallel = config.parallel
    config = _cut_by_costs(config, parallel.pipeline * parallel.chunks, measured)
    return _predicted(config, _make_greedy(config, measured, stash), measured, cores, stash)


def choose_schedule(
    config: Config, measured: MeasuredCosts, cores: float | None, limit_bytes: float = float("inf")
) -> Choice:
    """Simulate every schedule that is defined for this run, and choose.

    The fastest prediction wins, of equals (within 0.2 percent) the one with least memory. 1F1B stays where nothing is
    more than one percent faster, which is less than the simulation promises.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary; its chunks and partition count where they are not left open.
    measured, cores
        As for `plan_schedule`.
    limit_bytes : float
        Memory of one rank.

    Raises
    ------
    UsageError
        If no schedule is defined for this run, or none fits into memory, with each one's reason.
    """
    candidates: list[Candidate] = []
    refused: dict[str, str] = {}
    for option, stash in _options(config):
        label = _label(option, stash)
        try:
            candidate = _candidate(option, measured, cores, stash)
        except UsageError as error:
            refused[label] = str(error)
            continue
        if candidate.memory_bytes > limit_bytes:
            refused[label] = f"needs {candidate.memory_bytes / 2**30:.2f} GiB per rank of {limit_bytes / 2**30:.2f}"
            continue
        candidates.append(candidate)
    if not candidates:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in refused.items())
        raise UsageError(f'parallel.schedule = "auto": no schedule can run ({reasons})')
    ranking = sorted(candidates, key=lambda candidate: candidate.prediction.step_s)
    best_s = ranking[0].prediction.step_s
    plain = [candidate for candidate in ranking if candidate.config.parallel.schedule == PLAIN]
    if plain and plain[0].prediction.step_s <= best_s * (1 + _WORTH):
        return Choice(plain[0], tuple(ranking), refused)
    equal = [candidate for candidate in ranking if candidate.prediction.step_s <= best_s * (1 + _EQUAL)]
    return Choice(min(equal, key=lambda candidate: candidate.memory_bytes), tuple(ranking), refused)


def _label(config: Config, stash: int) -> str:
    parallel = config.parallel
    chunks = f", {parallel.chunks} chunks" if parallel.chunks > 1 else ""
    return parallel.schedule + chunks + (f", stash {stash}" if stash else "")


def _options(config: Config) -> Iterator[tuple[Config, int]]:
    """Yield the configuration with every schedule, every number of chunks that it may have, and its stash or 0."""
    parallel = config.parallel
    for name, generator in GENERATORS.items():
        counts = [count for count in _CHUNKS if count * parallel.pipeline <= config.model.layers + 1]
        if parallel.chunks:
            counts = [parallel.chunks] if generator.chunks in (0, parallel.chunks) else []
        elif parallel.pipeline == 1:
            counts = [1] if generator.chunks != 2 else []
        elif generator.chunks:
            counts = [generator.chunks]
        elif name == GREEDY:
            # Its search takes seconds for each ten thousand forwards.
            flow = parallel.pipeline * parallel.microbatches // parallel.data
            counts = [count for count in (1, *counts) if count * flow <= _MOST_FOR_GREEDY]
        for chunks in counts:
            if name != FORWARD and parallel.chunks in (0, chunks):
                option = replace(config, parallel=replace(parallel, schedule=name, chunks=chunks))
                yield option, 0
                if name == GREEDY and parallel.pipeline > 1:
                    yield option, 2 * parallel.pipeline


def _candidate(option: Config, measured: MeasuredCosts, cores: float | None, stash: int) -> Candidate:
    parallel = option.parallel
    option = check_stages(option, parallel.pipeline * parallel.chunks)
    if parallel.schedule == GREEDY:
        return plan_greedy(option, measured, cores, stash)
    num_microbatches = parallel.microbatches // parallel.data
    schedule = build(parallel.schedule, parallel.pipeline, num_microbatches, parallel.chunks)
    return plan_schedule(option, schedule, measured, cores)


def _cut_by_costs(config: Config, num_stages: int, measured: MeasuredCosts) -> Config:
    """Fill in the partition, unless it was made by hand."""
    if not isinstance(config.parallel.partition, str):
        return config
    costs = [layer.forward + layer.backward for layer in measured.of_model(config.model.layers)]
    return replace(config, parallel=replace(config.parallel, partition=tuple(balance_blocks(costs, num_stages))))


def _make_greedy(config: Config, measured: MeasuredCosts, stash: int) -> Schedule:
    parallel = config.parallel
    assert not isinstance(parallel.partition, str)
    costs = stage_costs(parallel.partition, measured)
    max_stash = [stash] * parallel.pipeline if stash else None
    num_microbatches = parallel.microbatches // parallel.data
    return build(GREEDY, parallel.pipeline, num_microbatches, parallel.chunks, costs, max_stash)


def _predicted(
    config: Config, schedule: Schedule, measured: MeasuredCosts, cores: float | None, stash: int = 0
) -> Candidate:
    prediction = predict_step(config, schedule, measured, cores)
    memory_bytes = predict_largest_bytes(config, schedule)
    return Candidate(config, schedule, prediction, memory_bytes, stash)
