"""The gradients of a rank's stages over one step, and the two uses of a tied tensor."""

from collections.abc import Mapping, Sequence

import numpy as np

from hpcpipe.kernels.reduce import add_into
from hpcpipe.memory.arena import Arena
from hpcpipe.memory.layout import new_arrays
from hpcpipe.model.embedding import TOKEN_TABLE
from hpcpipe.model.head import TABLE as HEAD_TABLE
from hpcpipe.model.layer import Arrays
from hpcpipe.model.tensors import BufferSpec, f32
from hpcpipe.mpi.channel import Channel
from hpcpipe.mpi.grid import Grid
from hpcpipe.optim.lanes import GradientLanes
from hpcpipe.optim.shards import Slice
from hpcpipe.train.stage_tensors import StageTensors
from hpcpipe.train.state import State


class Gradients:
    """The accumulators of a rank's stages.

    Parameters
    ----------
    state : State
        Gives the stages and their shapes.
    num_lanes : int
        Lanes of this replica.
    num_microbatches : int
        Microbatches of this replica.

    Attributes
    ----------
    totals : dict of int to Arena
        The sums of the stages that `close` was called for, in this step.
    """

    def __init__(self, state: State, num_lanes: int, num_microbatches: int) -> None:
        self._stages = state.stages
        self._lanes = {
            index: GradientLanes(stage.parameters.new_gradients, num_lanes, num_microbatches)
            for index, stage in state.stages.items()
        }
        self._views: dict[int, list[Arrays]] = {}
        self.totals: dict[int, Arena] = {}

    def of_layers(self, stage: int, index: int) -> list[Arrays]:
        """Return each layer's arrays in the accumulator of a microbatch, under local names."""
        lane = self._lanes[stage].current(index)
        if id(lane) not in self._views:
            self._views[id(lane)] = [
                {tensor.name.removeprefix(layer.prefix): lane.arrays[tensor.name] for tensor in layer.tensors}
                for layer in self._stages[stage].layers
            ]
        return self._views[id(lane)]

    def finished(self, stage: int, index: int) -> None:
        """Note that a stage has added a microbatch."""
        self._lanes[stage].finished(index)

    def close(self, stage: int) -> Arena:
        """Return a stage's sum over this replica's microbatches, to be given back with `reset`."""
        total = self.totals[stage] = self._lanes[stage].total()
        return total

    def reset(self) -> None:
        """Take the totals back before the next step."""
        for stage in self.totals:
            self._lanes[stage].reset()
        self.totals.clear()


def tied_uses(
    stages: Mapping[int, StageTensors], last_stage: int, is_tied: bool, replica: int
) -> list[tuple[int, Slice]]:
    """Return a replica's parts of the tied table's uses on a rank: none, one, or the embedding's and the head's.

    Parameters
    ----------
    stages : mapping of int to StageTensors
        The rank's stages.
    last_stage : int
        The stage with the head.
    is_tied : bool
        Whether the model has a tied table.
    replica : int
        Whose shard.
    """
    both = ((0, TOKEN_TABLE), (last_stage, HEAD_TABLE)) if is_tied else ()
    return [
        (index, held)
        for index, name in both
        if index in stages
        for bucket in stages[index].buckets
        for held in bucket.slices(replica)
        if held.name == name
    ]


def tied_spec(uses: Sequence[tuple[int, Slice]]) -> BufferSpec:
    """Return what the other end's use is received into, where that is on another rank."""
    return f32(uses[0][1].size if len(uses) == 1 else 0)


class TiedGradients:
    """The sum of the gradients of a tied tensor's two uses, the embedding's first and then the head's.

    Both uses are cut into the same shards, so each replica exchanges only its own.

    Parameters
    ----------
    state : State
        Says whether the model is tied, and which ranks hold the two uses.
    grid : Grid
        This rank's place.
    channel : Channel
        Between the ranks of one pipeline.
    """

    # The tag of a message to the first stage's forward, which no schedule has.
    _TAG = 0

    def __init__(self, state: State, grid: Grid, channel: Channel) -> None:
        self._channel = channel
        self._holders = (state.placement[0], state.placement[-1])
        self._peer = self._holders[1] if grid.stage_rank == self._holders[0] else self._holders[0]
        self._uses = tied_uses(state.stages, state.last_stage, state.config.model.tied, grid.replica)
        self._received = new_arrays({"received": tied_spec(self._uses)}, "sums")["received"]

    def add_uses(self, totals: Mapping[int, Arena]) -> None:
        """Give both holders the sum of this replica's shard, in place.

        Parameters
        ----------
        totals : mapping of int to Arena
            This rank's gradients, whose own shards are summed over replicas.

        Raises
        ------
        RankError
            If the other holder does not answer in time.
        """
        uses = [held.of(totals[index].arrays) for index, held in self._uses]
        if len(uses) == 2:
            add_into(uses[0], uses[1])
            np.copyto(uses[1], uses[0])
        elif uses:
            names = f"gradients of the tied table from rank {self._peer}", f"those to rank {self._peer}"
            self._channel.post_receive(names[0], self._received, self._peer, self._TAG)
            self._channel.start_send(names[1], uses[0], self._peer, self._TAG)
            for name in names:
                self._channel.wait(name)
            # Addition commutes to the bit, so either holder may start from its own use.
            add_into(uses[0], self._received)
