"""Where each action of a schedule stands: the table that the proof reads."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Kind, Schedule

Table = npt.NDArray[np.int64]
Truths = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Positions:
    """Tables of positions.

    Attributes
    ----------
    of : dict of Kind to ndarray, shape (stages, microbatches)
        The position of an action in the list of its stage's rank, or -1 if it is not there.
    """

    of: dict[Kind, Table]

    def has(self, kind: Kind) -> Truths:
        """Return which actions of a kind exist, as booleans of shape (stages, microbatches)."""
        exists: Truths = self.of[kind] >= 0
        return exists

    def backward_done(self) -> Table:
        """Return where the gradient of a stage's input is ready: at B, or at I."""
        return np.maximum(self.of[Kind.B], self.of[Kind.I])

    def weights_done(self) -> Table:
        """Return where the gradients of a stage's weights are added: at B, or at W."""
        return np.maximum(self.of[Kind.B], self.of[Kind.W])


def failure(schedule: Schedule, rank: int, position: int, rule: str) -> UsageError:
    """Return the error for a broken rule, with the schedule, the rank, the position and the action."""
    actions = schedule.actions[rank]
    where = f"position {position}, {actions[position]}" if position < len(actions) else "the end of its list"
    return UsageError(f"schedule {schedule.name}: rank {rank}, {where}: {rule}")


def locate(schedule: Schedule) -> Positions:
    """Find every action, and check that each stands once, on the rank of its stage.

    Raises
    ------
    UsageError
        For an action that names another rank's stage, a stage or microbatch that does not exist, or that stands twice.
    """
    num_stages, num_microbatches = schedule.num_stages, schedule.num_microbatches
    size = num_stages * num_microbatches
    found = {kind: [-1] * size for kind in Kind}
    for rank, actions in enumerate(schedule.actions):
        held = set(schedule.stages_of(rank))
        for position, (kind, stage, k) in enumerate(actions):
            if stage not in held or not 0 <= k < num_microbatches:
                raise failure(schedule, rank, position, _misplaced(schedule, stage))
            index = stage * num_microbatches + k
            if found[kind][index] >= 0:
                raise failure(schedule, rank, position, "the action stands twice in the list")
            found[kind][index] = position
    shape = (num_stages, num_microbatches)
    return Positions({kind: np.array(table, np.int64).reshape(shape) for kind, table in found.items()})


def _misplaced(schedule: Schedule, stage: int) -> str:
    if not 0 <= stage < schedule.num_stages:
        return f"there are only {schedule.num_stages} stages"
    holder = schedule.stage_to_rank[stage]
    if holder not in range(schedule.num_ranks):
        return f"stage {stage} is given to rank {holder}, and there are only {schedule.num_ranks} ranks"
    return f"stage {stage} belongs to rank {holder}, or there are only {schedule.num_microbatches} microbatches"
