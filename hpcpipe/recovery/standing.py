"""What each process has to offer after a failure: one row of integers, which all processes exchange."""

from dataclasses import dataclass

import numpy as np

NOTHING = -1
"""Stands for no role, no step."""


@dataclass(frozen=True)
class Standing:
    """What a process says of itself when processes meet after a failure.

    Attributes
    ----------
    process : int
        Its number in the launch.
    role : int
        Its rank in the grid before the failure, -1 for a spare.
    is_ready : bool
        Whether it knows the plan of the run, so that its state has a layout.
    live : int
        Step that its weights and moments are of, -1 if they are of none.
    own : (int, int)
        Steps of the copies of its state in its own memory, -1 for none.
    held : tuple of (int, int)
        For each rank of the grid, the steps of the copies of its state that this process can reach, -1 for none; empty
        if it can reach none at all.
    finished : int
        One more than the exit code of the run, if its part of the run is over; else 0.
    failed : int
        Exit code of an error that it met alone and that ends the run; else 0.
    rewind : int
        Step that the run is to go back to, -1 if it does not ask for that.
    """

    process: int
    role: int = NOTHING
    is_ready: bool = False
    live: int = NOTHING
    own: tuple[int, int] = (NOTHING, NOTHING)
    held: tuple[tuple[int, int], ...] = ()
    finished: int = 0
    failed: int = 0
    rewind: int = NOTHING

    @property
    def is_spare(self) -> bool:
        """Whether it had no role."""
        return self.role == NOTHING

    def to_row(self, num_roles: int) -> np.ndarray:
        """Return it as int64; `num_roles` ranks have been in the grid."""
        facts = [self.process, self.role, self.is_ready, self.live, *self.own, self.finished, self.failed, self.rewind]
        held = self.held or ((NOTHING, NOTHING),) * num_roles
        return np.array([*facts, *(step for steps in held for step in steps)], np.int64)

    @classmethod
    def from_row(cls, row: np.ndarray) -> "Standing":
        """Return what `to_row` was called on."""
        process, role, is_ready, live, first, second, finished, failed, rewind, *rest = row.tolist()
        held = tuple(zip(rest[::2], rest[1::2], strict=True))
        return cls(process, role, bool(is_ready), live, (first, second), held, finished, failed, rewind)
