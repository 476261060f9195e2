"""Sums of squares of gradients, with the same bits however many replicas share the tensors."""

from collections.abc import Mapping

import numpy as np

from hpcpipe.kernels.reduce import BLOCK, block_sums_of_squares
from hpcpipe.memory.arena import Arena
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.state import State


class SquareSums:
    """The sum of squares of each tensor that a rank owns.

    A tensor's sum is defined as that of its blocks of ``BLOCK`` elements, added one by one in float64. Replicas hold
    whole blocks, so it does not matter who adds which.

    Parameters
    ----------
    state : State
        Gives the stages and their shards.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    """

    def __init__(self, state: State, grid: Grid, waiter: Waiter) -> None:
        self._grid = grid
        self._waiter = waiter
        self._slices = [
            [(index, held) for index, stage in state.stages.items() for held in stage.owned_slices(replica)]
            for replica in range(grid.data)
        ]
        lengths = [sum(held.num_blocks for _, held in slices) for slices in self._slices]
        # Every replica sends a row, so rows have one length.
        self._row = np.zeros(max(lengths))
        self._blocks = {
            tensor.name: np.zeros(-(-tensor.size // BLOCK))
            for stage in state.stages.values()
            for tensor in stage.owned()
        }

    def add(self, totals: Mapping[int, Arena]) -> dict[str, float]:
        """Return the sums, on every replica.

        Parameters
        ----------
        totals : mapping of int to Arena
            This rank's gradients, whose own shards are complete.

        Raises
        ------
        RankError
            If a replica does not answer in time.
        """
        start = 0
        for index, held in self._slices[self._grid.replica]:
            block_sums_of_squares(held.of(totals[index].arrays), self._row[start : start + held.num_blocks])
            start += held.num_blocks
        rows = gather_rows(self._grid.data_comm, self._waiter, self._row) if self._grid.data > 1 else self._row[None]
        for slices, row in zip(self._slices, rows, strict=True):
            start = 0
            for _, held in slices:
                first = held.start // BLOCK
                self._blocks[held.name][first : first + held.num_blocks] = row[start : start + held.num_blocks]
                start += held.num_blocks
        # Unlike numpy's sum, its accumulate adds from the first to the last.
        return {name: float(np.add.accumulate(blocks)[-1]) for name, blocks in self._blocks.items()}
