"""How much memory a rank will take, from the shapes of its layers and the lives of its buffers."""

from collections.abc import Collection

import numpy as np

from hpcpipe.config.schema import Config
from hpcpipe.errors import UsageError
from hpcpipe.kernels.reduce import BLOCK
from hpcpipe.model.embedding import TOKEN_TABLE
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.head import TABLE
from hpcpipe.model.layer import Layer
from hpcpipe.model.partition import partition
from hpcpipe.model.tensors import BufferShapes
from hpcpipe.mpi.shards import receive_elements
from hpcpipe.optim.shards import Bucket
from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.buffers import count_buffers
from hpcpipe.train.state import cut_stage

_FLOAT_BYTES = 4


def predict_bytes(config: Config, schedule: Schedule, stage_rank: int) -> int:
    """Return the bytes of weights, moments, gradients and activations of a pipeline rank, before any is allocated.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.
    schedule : Schedule
        Lowered; its lists say how many stashes live at once.
    stage_rank : int
        The rank's place in its pipeline.
    """
    model, parallel = config.model, config.parallel
    layers = build_layers(model, config.train.precision)
    cut = parallel.partition
    ranges = partition(layers, schedule.num_stages, None if isinstance(cut, str) else cut)
    counts = count_buffers(schedule, stage_rank)
    stream = parallel.microbatch_size * model.context * model.width
    total = (counts.streams + 2) * stream
    buckets: list[Bucket] = []
    for stage in schedule.stages_of(stage_rank):
        held = layers[ranges[stage].start : ranges[stage].stop]
        # Weights, and a gradient for every lane that is open at once.
        num_copies = 1 + (parallel.lanes // parallel.data).bit_length()
        total += num_copies * sum(tensor.size for layer in held for tensor in layer.tensors)
        total += _activations(held, parallel.microbatch_size, stream, counts.stashes, counts.upstreams, config)
        buckets += cut_stage(layers, held, parallel.data)
    return (total + _shards(buckets, parallel.data, (TOKEN_TABLE, TABLE) if model.tied else ())) * _FLOAT_BYTES


def require_memory(needed_bytes: int, num_local_ranks: int, available_bytes: int) -> None:
    """Refuse a run that does not fit into the memory of its node.

    Raises
    ------
    UsageError
        With the bytes that are needed, those there are, and what makes a run smaller.
    """
    total = needed_bytes * num_local_ranks
    if total > available_bytes:
        raise UsageError(
            f"the model and its activations need about {_gib(needed_bytes)} per rank, {_gib(total)} for the"
            f" {num_local_ranks} ranks of a node, and {_gib(available_bytes)} are free: use more nodes, set"
            ' train.recompute = "full", or lower parallel.microbatch_size, model.context, model.width or model.layers'
        )


def _shards(buckets: list[Bucket], num_replicas: int, tied: Collection[str]) -> int:
    """Return the elements that the replica with the largest shards keeps for the update."""
    shards = [[bucket.cuts[shard + 1] - bucket.cuts[shard] for bucket in buckets] for shard in range(num_replicas)]
    largest = max(map(max, shards))
    # Two moments, the sums of squares of blocks as float64 of all replicas, what sums over replicas receive into.
    moments = 2 * max(map(sum, shards))
    sums = 2 * sum(map(sum, shards)) // BLOCK
    uses = [max(np.diff(bucket.cuts)) for bucket in buckets if bucket.tensors[0].name in tied]
    # The other end's use of a tied tensor, where that is on another rank.
    received = int(uses[0]) if len(uses) == 1 else 0
    return moments + sums + receive_elements(num_replicas, largest) + received


def _activations(
    layers: tuple[Layer, ...], batch: int, stream: int, num_stashes: int, num_upstreams: int, config: Config
) -> int:
    stashes = [_elements(layer.stash_shapes(batch)) for layer in layers]
    upstreams = [_elements(layer.upstream_shapes(batch)) for layer in layers]
    scratch = max(_elements(layer.scratch_shapes(batch)) for layer in layers)
    streams = (num_stashes + 1) * (len(layers) - 1) * stream
    kept = sum(stashes) if config.train.recompute == "full" else num_stashes * sum(stashes)
    # An evaluation keeps one stash more, and a schedule with whole backwards shares one upstream between layers.
    return streams + kept + sum(stashes) + num_upstreams * sum(upstreams) + max(upstreams) + scratch


def _elements(shapes: BufferShapes) -> int:
    return sum(spec.reserved_bytes for spec in shapes.values()) // _FLOAT_BYTES


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
