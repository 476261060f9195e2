"""Whether weights and moments are what the last update has left: digests of the parts of a rank's state."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hpcpipe.kernels.digest import digest
from hpcpipe.mpi.collectives import gather_bytes
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.optim.adamw import MOMENTS
from hpcpipe.train.state import WEIGHT, State

_MASK = (1 << 64) - 1
_KEPT_STEPS = 2


@dataclass(frozen=True)
class Part:
    """A run of elements of a rank's state.

    Attributes
    ----------
    stage : int
        The stage.
    kind : str
        ``weight``, or the name of a moment.
    shard : int
        The replica that updates it.
    array : ndarray of float32
        A flat view of the state.
    """

    stage: int
    kind: str
    shard: int
    array: np.ndarray


def split_state(state: State) -> list[Part]:
    """Return all of a rank's weights and moments; those that it updates come in the order of `parts_of`."""
    parts = []
    for index, stage in state.stages.items():
        weights = stage.parameters.weights
        for bucket in stage.stored_buckets():
            elements = bucket.of(weights.flat, weights.offsets)
            parts += [
                Part(index, WEIGHT, shard, elements[first:last])
                for shard, (first, last) in enumerate(pairwise(bucket.cuts))
            ]
        parts += [Part(index, moment, stage.shard, stage.moments[moment].flat) for moment in MOMENTS]
    return parts


class StateGuard:
    """Digests of a rank's state, taken after each update and compared before the next.

    Parameters
    ----------
    state : State
        Only read, but for ``digests``: those of what the rank updates, for the last two steps.
    grid : Grid
        This rank's place.
    waiter : Waiter
        Waits, with its deadline.

    Attributes
    ----------
    parts : list of Part
        What the rank holds, in the order in which `find_damage` counts.
    """

    kinds = (WEIGHT, *MOMENTS)

    def __init__(self, state: State, grid: Grid, waiter: Waiter) -> None:
        self._state, self._grid, self._waiter = state, grid, waiter
        self.parts = split_state(state)
        self._known: list[int] = []

    def begin(self) -> None:
        """Take the digests of a state that none are known of: the first one of a run, or one that was restored."""
        if not self._known:
            self._known = self._take()
            digests = self._state.digests
            for step in [step for step in digests if step > self._state.step]:
                del digests[step]
            own = digests.setdefault(self._state.step, self._own())
            # What was known of this step before counts more than what the state holds now.
            for place, value in zip(self._own_places(), own, strict=True):
                self._known[place] = value

    def find_damage(self) -> int:
        """Return 1 + number of the first part that has changed since the last update, 0 if none has."""
        for number, (part, known) in enumerate(zip(self.parts, self._known, strict=True), start=1):
            if digest(part.array, self._state.team) != known:
                return number
        return 0

    def updated(self) -> None:
        """Take the digests of the state that a step has left."""
        self._known = self._take()
        self._keep()

    def unchanged(self) -> None:
        """Note that a step has left the state as it was."""
        self._keep()

    def weights(self) -> int:
        """Return one number for all weights as the last update has left them: the same on all replicas."""
        values = [value for part, value in zip(self.parts, self._known, strict=True) if part.kind == WEIGHT]
        return sum((2 * index + 1) * value for index, value in enumerate(values)) & _MASK

    def find_odd_replicas(self) -> list[tuple[int, int]]:
        """Return (rank, stage) of the replicas whose weights are not those of the others; all ranks call it."""
        own = [
            [part.stage, part.shard, value]
            for part, value in zip(self.parts, self._known, strict=True)
            if part.kind == WEIGHT
        ]
        content = np.array(own, np.uint64).tobytes()
        rows = [
            np.frombuffer(row, np.uint64).reshape(-1, 3).tolist()
            for row in gather_bytes(self._grid.comm, self._waiter, content)
        ]
        grid, odd = self._grid, set()
        for stage_rank in range(grid.pipeline):
            ranks = [grid.world_rank(replica, stage_rank) for replica in range(grid.data)]
            for parts in zip(*(rows[rank] for rank in ranks), strict=True):
                stage, shard, _ = parts[0]
                right = most_trusted([value for _, _, value in parts], shard)
                odd |= {(rank, stage) for rank, part in zip(ranks, parts, strict=True) if part[2] != right}
        return sorted(odd)

    def _take(self) -> list[int]:
        return [digest(part.array, self._state.team) for part in self.parts]

    def _keep(self) -> None:
        """Keep the digests of the last steps with the state."""
        digests = self._state.digests
        digests[self._state.step] = self._own()
        for step in sorted(digests)[:-_KEPT_STEPS]:
            del digests[step]

    def _own(self) -> tuple[int, ...]:
        return tuple(self._known[place] for place in self._own_places())

    def _own_places(self) -> list[int]:
        return [place for place, part in enumerate(self.parts) if part.shard == self._grid.replica]


def most_trusted(values: list[int], owner: int) -> int:
    """Return what most replicas have, or what the owner has where no value has a majority.

    Parameters
    ----------
    values : list of int
        Of each replica.
    owner : int
        The replica that the others have theirs from.
    """
    common = max(values, key=values.count)
    return common if 2 * values.count(common) > len(values) else values[owner]
