"""What each process has to offer after a failure: one row of integers, which all processes exchange."""

from dataclasses import astuple, dataclass

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
    held_role : int
        The rank whose copies it holds, -1 for none.
    held : (int, int)
        Steps of these.
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
    held_role: int = NOTHING
    held: tuple[int, int] = (NOTHING, NOTHING)
    finished: int = 0
    failed: int = 0
    rewind: int = NOTHING

    @property
    def is_spare(self) -> bool:
        """Whether it had no role."""
        return self.role == NOTHING

    def to_row(self) -> np.ndarray:
        """Return it as int64."""
        flat: list[int] = []
        for value in astuple(self):
            flat.extend(value if isinstance(value, tuple) else (int(value),))
        return np.array(flat, np.int64)

    @classmethod
    def from_row(cls, row: np.ndarray) -> "Standing":
        """Return what `to_row` was called on."""
        process, role, is_ready, live, own0, own1, held_role, held0, held1, finished, failed, rewind = row.tolist()
        own, held = (own0, own1), (held0, held1)
        return cls(process, role, bool(is_ready), live, own, held_role, held, finished, failed, rewind)
