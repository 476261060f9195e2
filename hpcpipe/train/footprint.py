"""How much memory a rank takes, known before any is allocated: the same plans that it is then allocated by."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from hpcpipe.checkpoint.snapshot import snapshot_bytes
from hpcpipe.config.schema import Config
from hpcpipe.errors import UsageError
from hpcpipe.memory.arena import offsets_of
from hpcpipe.memory.block import allocated_bytes
from hpcpipe.memory.layout import Layout
from hpcpipe.model.tensors import BufferSpec, TensorSpec
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.optim.adamw import MOMENTS
from hpcpipe.pipeline.buffers import RankLayout, StageShape
from hpcpipe.pipeline.packed import packed_tensors, panel_specs
from hpcpipe.recovery.copies import NAME, copies_bytes, kept_by
from hpcpipe.schedule.action import Schedule
from hpcpipe.train.batches import batch_specs
from hpcpipe.train.gradients import tied_spec, tied_uses
from hpcpipe.train.norm import square_specs
from hpcpipe.train.parts import entries_of
from hpcpipe.train.rows import row_specs
from hpcpipe.train.save import SNAPSHOT, piece_sizes
from hpcpipe.train.stage_tensors import ModelPlan, StageTensors, plan_model
from hpcpipe.train.state import moment_shapes
from hpcpipe.train.step import received_spec

_FLOAT_BYTES = 4


def predict_memory(
    config: Config, schedule: Schedule, stage_rank: int, replica: int = 0, *, on_several_nodes: bool = False
) -> dict[str, int]:
    """Return the bytes that a rank allocates to train, by what they are for.

    Beside them are small things: views of these blocks, the program itself, and what MPI keeps.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.
    schedule : Schedule
        Lowered; its lists say how long everything lives.
    stage_rank : int
        The rank's place in its pipeline.
    replica : int
        The replica that it belongs to.
    on_several_nodes : bool
        Whether a rank may have to keep its neighbour's copies in memory of its own.
    """
    rank = _Rank(config, plan_model(config, schedule.num_stages), schedule, stage_rank, on_several_nodes)
    activations = Counter({"activations": sum(rank.activations.place()[1])})
    return dict(rank.fixed() + rank.of_replica(replica) + activations)


def predict_bytes(config: Config, schedule: Schedule, stage_rank: int, replica: int = 0) -> int:
    """Return the sum of `predict_memory`; parameters as there."""
    return sum(predict_memory(config, schedule, stage_rank, replica).values())


def predict_largest_bytes(config: Config, schedule: Schedule) -> int:
    """Return the most bytes that any rank allocates, of all pipeline ranks and replicas."""
    plan = plan_model(config, schedule.num_stages)
    ranks = [_Rank(config, plan, schedule, stage_rank) for stage_rank in range(schedule.num_ranks)]
    # Placing takes time, so that it is left out where a lower bound shows that another rank needs more.
    bounds = {rank: rank.total(rank.activations.least_bytes()) for rank in ranks}
    largest = 0
    for rank, bound in sorted(bounds.items(), key=lambda item: -item[1]):
        if bound <= largest:
            break
        largest = max(largest, rank.total(sum(rank.activations.place()[1])))
    return largest


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
            f"the model and its activations need {_gib(needed_bytes)} per rank, {_gib(total)} for the"
            f" {num_local_ranks} ranks of a node, and {_gib(available_bytes)} are free: use more nodes, set"
            ' train.recompute = "selective" or "full", or lower parallel.microbatch_size, model.context, model.width or'
            " model.layers"
        )


def describe_predicted(predicted: Mapping[str, int]) -> str:
    """Say what rank 0 is going to allocate, and for what."""
    parts = ", ".join(
        f"{name} {_mib(num_bytes)}" for name, num_bytes in sorted(predicted.items(), key=lambda item: -item[1])
    )
    return f"{sum(predicted.values()):,} bytes predicted on rank 0: {parts}"


def describe_allocated(grid: Grid, waiter: Waiter, predicted: Mapping[str, int]) -> str:
    """Say what was allocated on rank 0 and on all ranks under the names of a prediction; all ranks call it."""
    allocated = allocated_bytes()
    total = sum(allocated.get(name, 0) for name in predicted)
    rows = gather_rows(grid.comm, waiter, np.array([total], np.int64))[:, 0].tolist()
    others = f", {_mib(sum(rows))} on all {grid.comm.size} ranks" if grid.comm.size > 1 else ""
    return f"{rows[0]:,} bytes allocated on rank 0{others}"


class _Rank:
    """The plans of one pipeline rank."""

    def __init__(
        self,
        config: Config,
        plan: ModelPlan,
        schedule: Schedule,
        stage_rank: int,
        is_on_several_nodes: bool = False,
    ) -> None:
        parallel, model = config.parallel, config.model
        self._config = config
        self._schedule = schedule
        self._plan = plan
        self._stage_rank = stage_rank
        self._is_on_several_nodes = is_on_several_nodes
        self._model = plan.layers
        self._stages = {index: plan.stage(index) for index in schedule.stages_of(stage_rank)}
        stream = (parallel.microbatch_size * model.context, model.width)
        shapes = {
            index: StageShape(
                stage.layers, parallel.microbatch_size, stream, config.train.recompute, max(1, parallel.threads)
            )
            for index, stage in self._stages.items()
        }
        self.activations = RankLayout(schedule, stage_rank, shapes)

    def fixed(self) -> Counter[str]:
        """Return what all replicas have alike, without activations."""
        parallel, model, stages = self._config.parallel, self._config.model, self._stages.values()
        num_microbatches = parallel.microbatches // parallel.data
        sums = (
            {"received": received_spec(self._stages, parallel.data)},
            square_specs(self._stages, parallel.data),
            row_specs(self._model, num_microbatches, parallel.pipeline * parallel.data),
        )
        # A lane is open for every digit of a binary counter of lanes.
        num_gradients = (parallel.lanes // parallel.data).bit_length()
        return Counter(
            {
                "weights": sum(_arena_bytes(stage.layout.stored) for stage in stages),
                "packed weights": sum(_packed_bytes(stage) for stage in stages),
                "gradients": num_gradients * sum(_arena_bytes(stage.layout.used) for stage in stages),
                "batches": num_microbatches * _bytes(batch_specs(parallel.microbatch_size, model.context)),
                "sums": sum(map(_bytes, sums)),
            }
        )

    def of_replica(self, replica: int) -> Counter[str]:
        """Return what depends on the shard."""
        moments = sum(offsets_of(moment_shapes(stage, replica))[1] for stage in self._stages.values())
        last_stage = self._schedule.num_stages - 1
        received = tied_spec(tied_uses(self._stages, last_stage, self._config.model.tied, replica))
        return Counter(
            {
                **self._copies(replica),
                "moments": len(MOMENTS) * moments * _FLOAT_BYTES,
                "sums": _bytes({"received": received}),
                SNAPSHOT: snapshot_bytes(piece_sizes(self._stages.values(), replica)),
            }
        )

    def _copies(self, replica: int) -> dict[str, int]:
        """Return what is kept of the own and the neighbour's state."""
        parallel = self._config.parallel
        if not self._config.recovery.copy_every or parallel.pipeline * parallel.data == 1:
            return {}
        role = replica * parallel.pipeline + self._stage_rank
        kept, stage_rank = divmod(kept_by(role, parallel.pipeline, parallel.data), parallel.pipeline)
        neighbour = [self._plan.stage(index) for index in self._schedule.stages_of(stage_rank)]
        own, held = entries_of(self._stages.values(), replica)[1], entries_of(neighbour, kept)[1]
        return {NAME: copies_bytes(own, held, as_messages=self._is_on_several_nodes)}

    def total(self, activation_bytes: int) -> int:
        """Return all bytes of the replica that needs most."""
        shards = [self.of_replica(replica).total() for replica in range(self._config.parallel.data)]
        return self.fixed().total() + max(shards) + activation_bytes


def _arena_bytes(tensors: Sequence[TensorSpec]) -> int:
    return offsets_of({tensor.name: tensor.shape for tensor in tensors})[1] * _FLOAT_BYTES


def _packed_bytes(stage: StageTensors) -> int:
    stored = {tensor.name for tensor in stage.layout.stored}
    return _bytes(panel_specs(packed_tensors(stage.layers, stored)))


def _bytes(specs: Mapping[str, BufferSpec]) -> int:
    return sum(Layout(specs).extent)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
