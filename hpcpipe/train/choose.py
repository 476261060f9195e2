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
from hpcpipe.train.footprint import predict_bytes
from hpcpipe.train.predict import Prediction, predict

AUTO = "auto"
PLAIN = "1f1b"
_WORTH = 0.01
_MOST_CHUNKS = 8


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
    """

    config: Config
    schedule: Schedule
    prediction: Prediction
    memory_bytes: int

    @property
    def label(self) -> str:
        """The schedule's name, and its chunks where there are several."""
        chunks = self.config.parallel.chunks
        return self.config.parallel.schedule + (f", {chunks} chunks" if chunks > 1 else "")


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
    cut = config.parallel.partition
    if isinstance(cut, str):
        costs = [layer.forward + layer.backward for layer in measured.of_model(config.model.layers)]
        cut = tuple(balance_blocks(costs, schedule.num_stages))
    config = replace(config, parallel=replace(config.parallel, partition=cut))
    prediction = predict(schedule, cut, measured, config.parallel.data, cores)
    return Candidate(config, schedule, prediction, _memory_bytes(config, schedule))


def choose_schedule(
    config: Config, measured: MeasuredCosts, cores: float | None, limit_bytes: float = float("inf")
) -> Choice:
    """Simulate every schedule that is defined for this run, and choose.

    The fastest prediction wins; 1F1B stays where that is less than one percent faster, which is less than the
    simulation promises.

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
    for option in _options(config):
        parallel = option.parallel
        label = f"{parallel.schedule}, {parallel.chunks} chunks" if parallel.chunks > 1 else parallel.schedule
        try:
            candidate = _candidate(option, measured, cores)
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
    plain = [candidate for candidate in ranking if candidate.config.parallel.schedule == PLAIN]
    worth = ranking[0].prediction.step_s * (1 + _WORTH)
    chosen = plain[0] if plain and plain[0].prediction.step_s <= worth else ranking[0]
    return Choice(chosen, tuple(ranking), refused)


def _options(config: Config) -> Iterator[Config]:
    """Yield the configuration with every schedule, and every number of chunks that it may have."""
    parallel = config.parallel
    for name, generator in GENERATORS.items():
        if name == "forward":
            continue
        most = min(_MOST_CHUNKS, (config.model.layers + 1) // parallel.pipeline)
        counts = [generator.chunks] if generator.chunks else range(1 if parallel.pipeline == 1 else 2, most + 1)
        for chunks in counts:
            if parallel.chunks in (0, chunks):
                yield replace(config, parallel=replace(parallel, schedule=name, chunks=chunks))


def _candidate(option: Config, measured: MeasuredCosts, cores: float | None) -> Candidate:
    parallel = option.parallel
    num_microbatches = parallel.microbatches // parallel.data
    schedule = build(parallel.schedule, parallel.pipeline, num_microbatches, parallel.chunks)
    return plan_schedule(check_stages(option, schedule.num_stages), schedule, measured, cores)


def _memory_bytes(config: Config, schedule: Schedule) -> int:
    return max(predict_bytes(config, schedule, rank) for rank in range(schedule.num_ranks))
