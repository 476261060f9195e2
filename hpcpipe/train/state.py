"""What a rank trains: its stages of the model, their weights, and the optimizer's state."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from hpcpipe.config.schema import Config, TrainConfig
from hpcpipe.kernels.threads import Team
from hpcpipe.memory.arena import Arena, offsets_of
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.initial import fill_initial
from hpcpipe.model.layer import ALONE, Layer
from hpcpipe.model.partition import partition
from hpcpipe.model.tensors import TensorSpec
from hpcpipe.optim.adamw import MOMENTS, AdamW
from hpcpipe.optim.shards import Bucket, Slice, cut_into_buckets
from hpcpipe.pipeline.parameters import Parameters, layout_of
from hpcpipe.pipeline.stage import Stage
from hpcpipe.train.stopwatch import TimedLayer

WEIGHT = "weight"


@dataclass(frozen=True)
class StageState:
    """What is trained of one stage.

    Attributes
    ----------
    layers : tuple of Layer
        The stage's layers.
    parameters : Parameters
        Their weights, whole on every replica.
    buckets : tuple of Bucket
        Every use of a tensor, cut into one shard per replica.
    shard : int
        The replica, which updates this shard.
    moments : dict of str to Arena
        AdamW's two moments of the shard's part of each stored tensor, under the tensor's name.
    """

    layers: tuple[Layer, ...]
    parameters: Parameters
    buckets: tuple[Bucket, ...]
    shard: int
    moments: dict[str, Arena]

    def stored_buckets(self) -> Iterator[Bucket]:
        """Yield the buckets that have weights here: not the use of a tied tensor whose original is on the stage."""
        return (bucket for bucket in self.buckets if bucket.tensors[0].name in self.parameters.weights.offsets)

    def stored_slices(self) -> Iterator[Slice]:
        """Yield the parts of tensors that this replica updates."""
        return chain.from_iterable(bucket.slices(self.shard) for bucket in self.stored_buckets())

    def owned(self) -> Iterator[TensorSpec]:
        """Yield the tensors that this stage writes to checkpoints: not the copy of a tied one."""
        return (tensor for tensor in self.parameters.layout.stored if not tensor.tied_to)

    def owned_slices(self, shard: int) -> Iterator[Slice]:
        """Yield a replica's parts of the tensors that this stage writes to checkpoints."""
        owned = {tensor.name for tensor in self.owned()}
        slices = chain.from_iterable(bucket.slices(shard) for bucket in self.buckets)
        return (held for held in slices if held.name in owned)

    def arrays(self, held: Slice) -> Iterator[tuple[str, np.ndarray]]:
        """Yield weight and moments of a part that this replica updates, with the names of their kinds."""
        yield WEIGHT, held.of(self.parameters.weights.arrays)
        for moment in MOMENTS:
            yield moment, self.moments[moment].arrays[held.name]

    def optimizers(self, train: TrainConfig) -> list[tuple[Bucket, AdamW]]:
        """Return the optimizer of each stored bucket's shard, which updates the moments here."""
        moments = {moment: arena.arrays for moment, arena in self.moments.items()}
        return [(bucket, AdamW(list(bucket.slices(self.shard)), moments, train)) for bucket in self.stored_buckets()]


@dataclass
class State:
    """The part of the training state that one rank holds.

    Attributes
    ----------
    config : Config
        Resolved, with the vocabulary.
    model : tuple of Layer
        All layers of the model.
    placement : tuple of int
        The pipeline rank of each stage.
    stages : dict of int to StageState
        The stages of this rank.
    step : int
        Last finished step.
    team : Team
        The threads of the rank.
    """

    config: Config
    model: tuple[Layer, ...]
    placement: tuple[int, ...]
    stages: dict[int, StageState]
    step: int = 0
    team: Team = ALONE

    @property
    def last_stage(self) -> int:
        """The stage with the head."""
        return len(self.placement) - 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on, over all replicas."""
        parallel = self.config.parallel
        return parallel.microbatches * parallel.microbatch_size * self.config.model.context

    def fill_initial(self) -> None:
        """Set the starting weights; the moments are zero."""
        for stage in self.stages.values():
            for tensor in stage.parameters.layout.stored:
                fill_initial(tensor, self.config.run.seed, stage.parameters.weights.arrays[tensor.name])
        self.pack()

    def pack(self) -> None:
        """Let bfloat16 products read the weights as they are now."""
        for stage in self.stages.values():
            stage.parameters.packed.pack()

    def compute_stages(self, batch: int, recompute: bool = False, timed: bool = False) -> dict[int, Stage]:
        """Return this rank's stages ready for microbatches of `batch` samples, with stopwatches if `timed`."""
        model = self.config.model
        stages = {}
        for index, stage in self.stages.items():
            layers = [TimedLayer(layer) for layer in stage.layers] if timed else stage.layers
            stages[index] = Stage(layers, stage.parameters, batch, model.context, model.width, recompute, self.team)
        return stages


def build_state(
    config: Config, placement: Sequence[int], stage_rank: int, replica: int = 0, team: Team = ALONE
) -> State:
    """Allocate the state of a pipeline rank.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.
    placement : sequence of int
        The pipeline rank of each stage.
    stage_rank : int
        This rank's place in its pipeline.
    replica : int
        The replica that it belongs to, of ``parallel.data``; it holds that shard of the moments.
    team : Team
        The threads of the rank.
    """
    model = build_layers(config.model, config.train.precision)
    cut = config.parallel.partition
    ranges = partition(model, len(placement), None if isinstance(cut, str) else cut)
    held = [stage for stage, rank in enumerate(placement) if rank == stage_rank]
    stages = {
        stage: _build_stage(model, model[ranges[stage].start : ranges[stage].stop], config.parallel.data, replica)
        for stage in held
    }
    return State(config, model, tuple(placement), stages, team=team)


def cut_stage(model: Sequence[Layer], held: Sequence[Layer], num_replicas: int) -> tuple[Bucket, ...]:
    """Return the buckets of a stage; both uses of a tied tensor are cut alike, on whatever stages they are.

    Parameters
    ----------
    model, held : sequence of Layer
        All layers, and those of the stage.
    num_replicas : int
        Shards per bucket.
    """
    tied = {
        name for layer in model for tensor in layer.tensors if tensor.tied_to for name in (tensor.name, tensor.tied_to)
    }
    used = layout_of(held).used
    offsets, _ = offsets_of({tensor.name: tensor.shape for tensor in used})
    return cut_into_buckets(used, offsets, tied, num_replicas)


def _build_stage(model: Sequence[Layer], layers: tuple[Layer, ...], num_replicas: int, replica: int) -> StageState:
    stage = StageState(layers, Parameters(layers), cut_stage(model, layers, num_replicas), replica, {})
    shapes = {held.name: (held.size,) for held in stage.stored_slices()}
    stage.moments.update({moment: Arena(shapes) for moment in MOMENTS})
    return stage
