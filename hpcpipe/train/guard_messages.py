"""Whether the messages of a step arrived as they were sent, and if not, between which ranks."""

import numpy as np

from hpcpipe.kernels.digest import digest
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.tally import Tally, differing_links
from hpcpipe.mpi.wait import Waiter

_MASK = (1 << 64) - 1


class MessageGuard:
    """Counts the content of the messages of one step.

    Parameters
    ----------
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.

    Attributes
    ----------
    in_pipeline, between_replicas : Tally
        Of the messages between the ranks of a pipeline, and between replicas.
    """

    def __init__(self, grid: Grid, waiter: Waiter) -> None:
        self._grid, self._waiter = grid, waiter
        self.in_pipeline, self.between_replicas = Tally(digest), Tally(digest)

    def clear(self) -> None:
        """Begin a step."""
        self.in_pipeline.clear()
        self.between_replicas.clear()

    def balance(self) -> int:
        """Return what was sent less what was received, modulo 2**64: over all ranks it adds up to 0."""
        return (self.in_pipeline.balance() + self.between_replicas.balance()) & _MASK

    def find_links(self) -> list[tuple[int, int]]:
        """Return (sender, receiver), ranks of the grid, between which messages have changed; all ranks call it."""
        grid = self._grid
        own = [*self.in_pipeline.row(grid.pipeline), *self.between_replicas.row(grid.data)]
        rows = gather_rows(grid.comm, self._waiter, np.array(own, np.uint64)).tolist()
        places = [
            [grid.world_rank(replica, stage_rank) for stage_rank in range(grid.pipeline)]
            for replica in range(grid.data)
        ]
        links = []
        for ranks in places:
            links += _named(ranks, [rows[rank][: 2 * grid.pipeline] for rank in ranks])
        for ranks in map(list, zip(*places, strict=True)):
            links += _named(ranks, [rows[rank][2 * grid.pipeline :] for rank in ranks])
        return links


def _named(ranks: list[int], rows: list[list[int]]) -> list[tuple[int, int]]:
    """Return the links that differ among some ranks, by the numbers of these."""
    return [(ranks[sender], ranks[receiver]) for sender, receiver in differing_links(rows)]
