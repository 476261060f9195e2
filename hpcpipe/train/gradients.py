"""The gradients of a rank's stages over one step, and the two uses of a tied tensor."""

import numpy as np

from hpcpipe.kernels.reduce import add_into
from hpcpipe.memory.arena import Arena
from hpcpipe.model.embedding import TOKEN_TABLE
from hpcpipe.model.head import TABLE as HEAD_TABLE
from hpcpipe.model.layer import Arrays
from hpcpipe.mpi.collectives import exchange
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.optim.lanes import GradientLanes
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
    """

    def __init__(self, state: State, num_lanes: int, num_microbatches: int) -> None:
        self._stages = state.stages
        self._lanes = {
            index: GradientLanes(stage.parameters.new_gradients, num_lanes, num_microbatches)
            for index, stage in state.stages.items()
        }
        self._views: dict[int, list[Arrays]] = {}

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

    def totals(self) -> dict[int, Arena]:
        """Return each stage's sum over this replica's microbatches, to be given back with `reset`."""
        return {index: lanes.total() for index, lanes in self._lanes.items()}

    def reset(self) -> None:
        """Take the totals back before the next step."""
        for lanes in self._lanes.values():
            lanes.reset()


class TiedGradients:
    """The sum of the gradients of a tied tensor's two uses, the embedding's first and then the head's.

    Parameters
    ----------
    state : State
        Says whether the model is tied, and which ranks hold the two uses.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    """

    def __init__(self, state: State, grid: Grid, waiter: Waiter) -> None:
        self._grid = grid
        self._waiter = waiter
        self._is_tied = state.config.model.tied
        self._first, self._last = 0, state.last_stage
        self._holders = (state.placement[0], state.placement[-1])
        meets = self._is_tied and self._holders[0] != self._holders[1] and grid.stage_rank in self._holders
        model = state.config.model
        self._received = np.empty(model.vocab * model.width if meets else 0, np.float32)

    def add_uses(self, totals: dict[int, Arena]) -> None:
        """Give both holders the sum, in place.

        Parameters
        ----------
        totals : dict of int to Arena
            This rank's gradients, already summed over replicas.
        """
        if not self._is_tied or self._grid.stage_rank not in self._holders:
            return
        uses = [
            totals[stage].arrays[name].reshape(-1)
            for stage, name in ((self._first, TOKEN_TABLE), (self._last, HEAD_TABLE))
            if stage in totals
        ]
        if len(uses) == 2:
            add_into(uses[0], uses[1])
            np.copyto(uses[1], uses[0])
            return
        peer = self._holders[1] if self._grid.stage_rank == self._holders[0] else self._holders[0]
        exchange(self._grid.pipeline_comm, self._waiter, peer, uses[0], self._received)
        # Addition commutes to the bit, so either holder may start from its own use.
        add_into(uses[0], self._received)
