"""Sums of squares of gradients, with the same bits however many replicas share the tensors."""

from collections.abc import Mapping

import numpy as np

from hpcpipe.kernels.reduce import BLOCK, block_sums_of_squares
from hpcpipe.memory.arena import Arena
from hpcpipe.memory.layout import new_arrays
from hpcpipe.model.tensors import BufferSpec, f64
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.optim.shards import Slice
from hpcpipe.train.stage_tensors import StageTensors

_Parts = list[list[tuple[int, Slice]]]


def square_specs(stages: Mapping[int, StageTensors], num_replicas: int) -> dict[str, BufferSpec]:
    """Return what `SquareSums` computes on: rows of sums to exchange, the sums of a tensor's blocks, running sums."""
    lengths = [sum(held.num_blocks for _, held in parts) for parts in _parts(stages, num_replicas)]
    blocks = {tensor.name: f64(-(-tensor.size // BLOCK)) for stage in stages.values() for tensor in stage.owned()}
    # Every replica sends a row, so rows have one length.
    return {
        "row": f64(max(lengths)),
        "rows": f64(num_replicas if num_replicas > 1 else 0, max(lengths)),
        "running": f64(max((spec.shape[0] for spec in blocks.values()), default=0)),
        **{f"blocks of {name}": spec for name, spec in blocks.items()},
    }


def _parts(stages: Mapping[int, StageTensors], num_replicas: int) -> _Parts:
    """Return what each replica adds up, in the order of its row."""
    return [
        [(index, held) for index, stage in stages.items() for held in stage.owned_slices(replica)]
        for replica in range(num_replicas)
    ]


class SquareSums:
    """The sum of squares of each tensor that a rank owns.

    A tensor's sum is defined as that of its blocks of ``BLOCK`` elements, added one by one in float64. Replicas hold
    whole blocks, so it does not matter who adds which.

    Parameters
    ----------
    stages : mapping of int to StageTensors
        The rank's stages and their shards.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.
    """

    def __init__(self, stages: Mapping[int, StageTensors], grid: Grid, waiter: Waiter) -> None:
        self._grid = grid
        self._waiter = waiter
        arrays = new_arrays(square_specs(stages, grid.data), "sums")
        self._row, self._rows, self._running = arrays["row"], arrays["rows"], arrays["running"]
        if grid.data == 1:
            self._rows = self._row[None]
        self._blocks = {
            tensor.name: arrays[f"blocks of {tensor.name}"] for stage in stages.values() for tensor in stage.owned()
        }
        self._parts = _parts(stages, grid.data)

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
        for index, held in self._parts[self._grid.replica]:
            block_sums_of_squares(held.of(totals[index].arrays), self._row[start : start + held.num_blocks])
            start += held.num_blocks
        if self._grid.data > 1:
            gather_rows(self._grid.data_comm, self._waiter, self._row, out=self._rows)
        for parts, row in zip(self._parts, self._rows, strict=True):
            start = 0
            for _, held in parts:
                first = held.start // BLOCK
                self._blocks[held.name][first : first + held.num_blocks] = row[start : start + held.num_blocks]
                start += held.num_blocks
        return {name: self._sum(blocks) for name, blocks in self._blocks.items()}

    def _sum(self, blocks: np.ndarray) -> float:
        """Add from the first to the last, which numpy's accumulate does, unlike its sum."""
        running = self._running[: blocks.size]
        np.add.accumulate(blocks, out=running)
        return float(running[-1])
