"""Gradient sums whose bits do not depend on the number of replicas.

A step's microbatches are cut into lanes, contiguous runs of equal length. Within a lane gradients add up in ascending
microbatch order; lanes add up like the digits of a binary counter: ``((0+1)+(2+3))+...``. A replica that holds an
aligned block of a power of two lanes computes a subtree of that sum, so summing the replicas in the same order gives
the bits that one replica would have got. `hpcpipe.mpi.collectives.tree_sum` is the same order over ranks.
"""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from hpcpipe.kernels.reduce import add_into


class Accumulator(Protocol):
    """Memory for one sum of gradients."""

    @property
    def flat(self) -> np.ndarray:
        """All of it, as one array."""
        ...


A = TypeVar("A", bound=Accumulator)


class GradientLanes(Generic[A]):
    """The gradient accumulators of one stage of one replica.

    Parameters
    ----------
    new_accumulator : callable
        Makes zeroed memory for one sum.
    num_lanes : int
        Lanes of this replica.
    num_microbatches : int
        Microbatches of this replica, a multiple of `num_lanes`.
    """

    def __init__(self, new_accumulator: Callable[[], A], num_lanes: int, num_microbatches: int) -> None:
        self._per_lane = num_microbatches // num_lanes
        # A counter that stays below num_lanes has at most this many digits set, less one, plus the lane being filled.
        self._free = [new_accumulator() for _ in range(num_lanes.bit_length())]
        self._sums: list[tuple[int, A]] = []
        self._current: A | None = None

    def current(self, microbatch: int) -> A:
        """Return the accumulator that a microbatch adds to; a new lane's is zero."""
        if microbatch % self._per_lane == 0 and self._current is None:
            self._current = self._free.pop()
            self._current.flat.fill(0.0)
        assert self._current is not None
        return self._current

    def finished(self, microbatch: int) -> None:
        """Close the lane if this was its last microbatch, and add up lanes of equal weight."""
        if (microbatch + 1) % self._per_lane or self._current is None:
            return
        self._sums.append((0, self._current))
        self._current = None
        while len(self._sums) > 1 and self._sums[-1][0] == self._sums[-2][0]:
            self._add_last_two()

    def total(self) -> A:
        """Return the sum over all lanes, to be given back with `reset`."""
        while len(self._sums) > 1:
            self._add_last_two()
        return self._sums[0][1]

    def reset(self) -> None:
        """Take the total back before the next step."""
        self._free.append(self._sums.pop()[1])

    def _add_last_two(self) -> None:
        _, later = self._sums.pop()
        level, earlier = self._sums.pop()
        add_into(earlier.flat, later.flat)
        self._free.append(later)
        self._sums.append((level + 1, earlier))
