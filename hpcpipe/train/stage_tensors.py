"""Which tensors a rank's stages have, and how replicas share them: what memory is planned and made from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from hpcpipe.config.schema import Config
from hpcpipe.memory.arena import offsets_of
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.layer import Layer
from hpcpipe.model.partition import partition
from hpcpipe.model.tensors import TensorSpec
from hpcpipe.optim.shards import Bucket, Slice, cut_into_buckets
from hpcpipe.pipeline.parameters import ParameterLayout, layout_of


@dataclass(frozen=True)
class StageTensors:
    """The tensors of one stage, and their shards.

    Attributes
    ----------
    layers : tuple of Layer
        The stage's layers.
    buckets : tuple of Bucket
        Every use of a tensor, cut into one shard per replica.
    """

    layers: tuple[Layer, ...]
    buckets: tuple[Bucket, ...]

    @cached_property
    def layout(self) -> ParameterLayout:
        """Which tensors the stage uses, and which of them have storage here."""
        return layout_of(self.layers)

    def stored_buckets(self) -> Iterator[Bucket]:
        """Yield the buckets that have weights here: not the use of a tied tensor whose original is on the stage."""
        stored = {tensor.name for tensor in self.layout.stored}
        return (bucket for bucket in self.buckets if bucket.tensors[0].name in stored)

    def updated_slices(self, shard: int) -> Iterator[Slice]:
        """Yield the parts of tensors that a replica updates, and keeps moments of."""
        return chain.from_iterable(bucket.slices(shard) for bucket in self.stored_buckets())

    def owned(self) -> Iterator[TensorSpec]:
        """Yield the tensors that this stage writes to checkpoints: not the copy of a tied one."""
        return (tensor for tensor in self.layout.stored if not tensor.tied_to)

    def owned_slices(self, shard: int) -> Iterator[Slice]:
        """Yield a replica's parts of the tensors that this stage writes to checkpoints."""
        owned = {tensor.name for tensor in self.owned()}
        slices = chain.from_iterable(bucket.slices(shard) for bucket in self.buckets)
        return (held for held in slices if held.name in owned)


@dataclass(frozen=True)
class ModelPlan:
    """The layers of a run's model, and how they are cut.

    Attributes
    ----------
    layers : tuple of Layer
        All of them.
    ranges : list of range
        Indices into `layers` of each stage.
    num_replicas : int
        Shards of every stage.
    """

    layers: tuple[Layer, ...]
    ranges: list[range]
    num_replicas: int

    def stage(self, index: int) -> StageTensors:
        """Return a stage."""
        held = self.layers[self.ranges[index].start : self.ranges[index].stop]
        return StageTensors(held, cut_stage(self.layers, held, self.num_replicas))


def plan_model(config: Config, num_stages: int) -> ModelPlan:
    """Return the layers of a run and their cut into stages; `config` is resolved, with the vocabulary."""
    layers, cut = build_layers(config.model, config.train.precision), config.parallel.partition
    ranges = partition(layers, num_stages, None if isinstance(cut, str) else cut)
    return ModelPlan(layers, ranges, config.parallel.data)


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
