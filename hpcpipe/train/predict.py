"""What a step will take, by running its schedule against measured costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpcpipe.config.schema import Config
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.partition import partition
from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.simulate import Costs, Timeline, simulate
from hpcpipe.train.costs import MeasuredCosts
from hpcpipe.train.profile import LayerCosts


@dataclass(frozen=True)
class Prediction:
    """A simulated step, in seconds.

    Attributes
    ----------
    step_s : float
        The whole step: the three parts, times the measured overhead.
    pipeline_s, update_s, exchange_s : float
        From the first forward to the last backward; what the optimizer takes behind it; what the replicas take to
        sum gradients and to share the updated weights, as if nothing of it were hidden behind the backward.
    timeline : Timeline
        Of the pipeline.
    """

    step_s: float
    pipeline_s: float
    update_s: float
    exchange_s: float
    timeline: Timeline


def predict_step(config: Config, schedule: Schedule, measured: MeasuredCosts, cores: float | None) -> Prediction:
    """Predict the step of a partitioned model.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary and with blocks per stage as its partition.
    schedule : Schedule
        What the ranks do, taken as it is.
    measured : MeasuredCosts
        Of layers and messages.
    cores : float or None
        Cores that the ranks of the pipeline share; None if each has its own.
    """
    cut = config.parallel.partition
    assert not isinstance(cut, str)
    layers = layers_of_stages(cut, measured)
    timeline = simulate(schedule, costs_of(layers, measured.message_s), cores)
    # The optimizer's work is shared over the replicas.
    updates = [sum(cost.update for cost in stage) / config.parallel.data for stage in layers]
    ranks = [sum(updates[stage] for stage in schedule.stages_of(rank)) for rank in range(schedule.num_ranks)]
    # All ranks update at the same time, and the step ends with the slowest.
    update_s = max(ranks) if cores is None else max(*ranks, sum(ranks) / cores)
    exchange_s = _exchange_s(config, schedule, cut, measured)
    step_s = measured.overhead * (timeline.makespan + update_s + exchange_s)
    return Prediction(step_s, timeline.makespan, update_s, exchange_s, timeline)


def stage_costs(blocks_per_stage: Sequence[int], measured: MeasuredCosts) -> Costs:
    """Return the costs of the stages of a partition."""
    return costs_of(layers_of_stages(blocks_per_stage, measured), measured.message_s)


def layers_of_stages(blocks_per_stage: Sequence[int], measured: MeasuredCosts) -> list[list[LayerCosts]]:
    """Return the costs of the layers of each stage; the embedding is on the first, the head on the last."""
    stages = [[measured.block] * count for count in blocks_per_stage]
    stages[0].insert(0, measured.embedding)
    stages[-1].append(measured.head)
    return stages


def costs_of(stages: Sequence[Sequence[LayerCosts]], message_s: float) -> Costs:
    """Add up the layers of each stage."""

    def total(part: Callable[[LayerCosts], float]) -> list[float]:
        return [sum(map(part, stage)) for stage in stages]

    return Costs(
        forward=total(lambda layer: layer.forward),
        backward_input=total(lambda layer: layer.backward_input),
        backward_weight=total(lambda layer: layer.backward_weight),
        message=message_s,
        backward=total(lambda layer: layer.backward),
    )


def cores_of_pipeline(config: Config, num_local_ranks: int, num_local_cores: int) -> float | None:
    """Return the cores that the ranks of one pipeline share, or None if every rank has its own."""
    if num_local_ranks <= num_local_cores:
        return None
    return config.parallel.pipeline * num_local_cores / num_local_ranks


def _exchange_s(config: Config, schedule: Schedule, cut: Sequence[int], measured: MeasuredCosts) -> float:
    """Return what a reduce-scatter of gradients and an all-gather of weights take the rank with most of them."""
    model, parallel = config.model, config.parallel
    layers = build_layers(model)
    sizes = [
        sum(tensor.size for layer in layers[held.start : held.stop] for tensor in layer.tensors)
        for held in partition(layers, schedule.num_stages, cut)
    ]
    largest = max(sum(sizes[stage] for stage in schedule.stages_of(rank)) for rank in range(schedule.num_ranks))
    streams = largest / (parallel.microbatch_size * model.context * model.width)
    return 2 * (parallel.data - 1) / parallel.data * streams * measured.message_s
