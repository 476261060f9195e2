"""What a rank trains: its stages of the model, their weights, and the optimizer's state."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from hpcpipe.config.schema import Config, TrainConfig
from hpcpipe.kernels.threads import ALONE, Team
from hpcpipe.memory.arena import Arena
from hpcpipe.model.initial import fill_initial
from hpcpipe.model.layer import Layer
from hpcpipe.optim.adamw import MOMENTS, AdamW
from hpcpipe.optim.shards import Bucket, Slice
from hpcpipe.pipeline.parameters import Parameters
from hpcpipe.pipeline.stage import Stage
from hpcpipe.train.stage_tensors import StageTensors, plan_model
from hpcpipe.train.stopwatch import TimedLayer

WEIGHT = "weight"


@dataclass(frozen=True)
class StageState(StageTensors):
    """What is trained of one stage.

    Attributes
    ----------
    parameters : Parameters
        The weights of its layers, whole on every replica.
    shard : int
        The replica, which updates this shard.
    moments : dict of str to Arena
        AdamW's two moments of the shard's part of each stored tensor, under the tensor's name.
    """

    parameters: Parameters
    shard: int
    moments: dict[str, Arena]

    def stored_slices(self) -> Iterator[Slice]:
        """Yield the parts of tensors that this replica updates."""
        return self.updated_slices(self.shard)

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
    is_torn : bool
        Whether weights and moments are not those of `step`: an update is under way, or they have changed by themselves.
    digests : dict of int to tuple of int
        Digests of the parts that this rank updates, after each of the last two steps, if they are guarded.
    """

    config: Config
    model: tuple[Layer, ...]
    placement: tuple[int, ...]
    stages: dict[int, StageState]
    step: int = 0
    team: Team = ALONE
    is_torn: bool = False
    digests: dict[int, tuple[int, ...]] = field(default_factory=dict)

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
            stage.parameters.packed.pack(self.team)

    def compute_stages(self, batch: int, recompute: str = "none", timed: bool = False) -> dict[int, Stage]:
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
    plan = plan_model(config, len(placement))
    stages = {
        index: _build_stage(plan.stage(index), replica) for index, rank in enumerate(placement) if rank == stage_rank
    }
    return State(config, plan.layers, tuple(placement), stages, team=team)


def moment_shapes(tensors: StageTensors, replica: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one moment of a replica's shard of a stage."""
    return {held.name: (held.size,) for held in tensors.updated_slices(replica)}


def _build_stage(tensors: StageTensors, replica: int) -> StageState:
    shapes = moment_shapes(tensors, replica)
    moments = {moment: Arena(shapes, "moments") for moment in MOMENTS}
    return StageState(tensors.layers, tensors.buckets, Parameters(tensors.layers), replica, moments)
