"""The update of what this replica holds of its stages, and what the others hold after theirs."""

from collections.abc import Mapping

import numpy as np

from hpcpipe.memory.arena import Arena
from hpcpipe.model.layer import Arrays
from hpcpipe.mpi.shards import ShardExchange
from hpcpipe.optim.adamw import AdamW
from hpcpipe.optim.shards import Bucket, Slice
from hpcpipe.pipeline.packed import PackedWeights
from hpcpipe.train.state import State


class _BucketUpdate:
    """The update of this replica's shard of a bucket."""

    def __init__(self, bucket: Bucket, held: list[Slice], optimizer: AdamW, packed: PackedWeights) -> None:
        self.bucket = bucket
        self.optimizer = optimizer
        self.packed = {
            part.name: packed.of(part.name) for part in held if part.size == part.tensor.size and part.name in packed
        }
        self._held = held

    def arrays(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Return the shard's elements: matrices that are packed as such, the others flat."""
        return {part.name: arrays[part.name] if part.name in self.packed else part.of(arrays) for part in self._held}


class Updates:
    """The updates of a rank's stages.

    Parameters
    ----------
    state : State
        Weights, and the moments of this replica's shard; updated in place.
    replica : int
        Whose shard.
    exchange : ShardExchange
        Gives the others what was updated here, and takes theirs.
    """

    def __init__(self, state: State, replica: int, exchange: ShardExchange) -> None:
        self._state, self._exchange = state, exchange
        self._of_stages = {
            index: [
                _BucketUpdate(bucket, list(bucket.slices(replica)), optimizer, stage.parameters.packed)
                for bucket, optimizer in stage.optimizers(state.config.train)
            ]
            for index, stage in state.stages.items()
        }
        # What other replicas update is packed when it has arrived.
        self._packed_here = {
            index: frozenset(name for update in updates for name in update.packed)
            for index, updates in self._of_stages.items()
        }

    def run(self, stage: int, totals: Mapping[int, Arena], step: int, scale: float, learning_rate: float) -> None:
        """Update this replica's shard of a stage, and start to share it.

        Parameters
        ----------
        stage : int
            The stage.
        totals : mapping of int to Arena
            Gradients, whose own shards are complete.
        step : int
            Counted from 1.
        scale : float
            What gradients are multiplied with.
        learning_rate : float
            The step's.
        """
        weights = self._state.stages[stage].parameters.weights
        for update in self._of_stages[stage]:
            update.optimizer.update(
                update.arrays(weights.arrays),
                update.arrays(totals[stage].arrays),
                step,
                scale,
                learning_rate,
                update.packed,
                self._state.team,
            )
            bucket = update.bucket
            self._exchange.all_gather(f"STEP{stage}", bucket.of(weights.flat, weights.offsets), bucket.cuts)

    def finish(self) -> None:
        """Wait for the shards of the others, and let products read the weights as they are now.

        Raises
        ------
        RankError
            If a replica does not answer in time.
        """
        self._exchange.finish()
        for index, stage in self._state.stages.items():
            stage.parameters.packed.pack(self._state.team, self._packed_here[index])
