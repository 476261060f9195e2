"""The part of a state that a rank answers for, as flat arrays: what is copied, compared and sent after a failure."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from hpcpipe.config.schema import Config
from hpcpipe.memory.arena import offsets_of
from hpcpipe.optim.adamw import MOMENTS
from hpcpipe.recovery.transfer import Entry
from hpcpipe.schedule.action import Schedule
from hpcpipe.train.stage_tensors import StageTensors, plan_model
from hpcpipe.train.state import WEIGHT, State, moment_shapes


def parts_of(state: State) -> list[np.ndarray]:
    """Return the weights and moments that this rank updates: flat views, of each stage its buckets and its moments."""
    parts = []
    for stage in state.stages.values():
        weights = stage.parameters.weights
        for bucket in stage.stored_buckets():
            first, last = bucket.cuts[stage.shard : stage.shard + 2]
            parts.append(bucket.of(weights.flat, weights.offsets)[first:last])
        parts += [stage.moments[moment].flat for moment in MOMENTS]
    return parts


def entries_of(stages: Iterable[StageTensors], shard: int) -> tuple[list[Entry], list[int]]:
    """Return what the parts of a rank hold, under global names, and the number of elements of each part.

    The copy of a tied tensor takes its place among the elements, but its original stands for it.

    Parameters
    ----------
    stages : iterable of StageTensors
        Of the rank, in order.
    shard : int
        The replica that it belongs to.
    """
    entries: list[Entry] = []
    offset, sizes = 0, []
    for stage in stages:
        owned = {tensor.name for tensor in stage.owned()}
        for bucket in stage.stored_buckets():
            first, last = bucket.cuts[shard : shard + 2]
            starts = {tensor.name: place for tensor, place in zip(bucket.tensors, bucket.offsets, strict=True)}
            for held in bucket.slices(shard):
                if held.name in owned:
                    place = offset + starts[held.name] + held.start - first
                    entries.append(Entry(held.name, WEIGHT, held.start, held.stop, place))
            offset += last - first
            sizes.append(last - first)
        offsets, size = offsets_of(moment_shapes(stage, shard))
        for moment in MOMENTS:
            entries += [
                Entry(held.name, moment, held.start, held.stop, offset + offsets[held.name])
                for held in stage.updated_slices(shard)
                if held.name in owned
            ]
            offset += size
            sizes.append(size)
    return entries, sizes


def entries_of_grid(config: Config, schedule: Schedule) -> tuple[dict[int, list[Entry]], dict[int, list[int]]]:
    """Return `entries_of` for every rank of a grid: the entries of each, and the elements of its parts."""
    plan = plan_model(config, schedule.num_stages)
    stages = [plan.stage(index) for index in range(schedule.num_stages)]
    entries, sizes = {}, {}
    for role in range(config.parallel.pipeline * config.parallel.data):
        replica, stage_rank = divmod(role, config.parallel.pipeline)
        held = [stages[index] for index in schedule.stages_of(stage_rank)]
        entries[role], sizes[role] = entries_of(held, replica)
    return entries, sizes


def wanted_by(stages: Mapping[int, StageTensors], shard: int) -> list[Entry]:
    """Return what fills the state of a rank: all weights of its stages, and the moments of its shard."""
    wanted = []
    for stage in stages.values():
        originals = {tensor.name: tensor.tied_to or tensor.name for tensor in stage.layout.stored}
        wanted += [Entry(originals[tensor.name], WEIGHT, 0, tensor.size, 0) for tensor in stage.layout.stored]
        for moment in MOMENTS:
            held_slices = stage.updated_slices(shard)
            wanted += [Entry(originals[held.name], moment, held.start, held.stop, 0) for held in held_slices]
    return wanted


def targets_of(state: State) -> Iterator[np.ndarray]:
    """Yield the arrays that `wanted_by` fills, in its order; flat views."""
    for stage in state.stages.values():
        for tensor in stage.parameters.layout.stored:
            yield stage.parameters.weights.arrays[tensor.name].reshape(-1)
        for moment in MOMENTS:
            for held in stage.stored_slices():
                yield stage.moments[moment].arrays[held.name].reshape(-1)
