"""Where each action of a schedule stands: the table that the proof reads."""

from dataclasses import dataclass

import numpy as np

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.flat import KINDS, Flat, Table, Truths, flatten


@dataclass(frozen=True)
class Positions:
    """Tables of positions.

    Attributes
    ----------
    of : dict of Kind to ndarray, shape (stages, microbatches)
        The position of an action in the list of its stage's rank, or -1 if it is not there.
    flat : Flat
        The same actions as arrays.
    """

    of: dict[Kind, Table]
    flat: Flat
    _starts: Table

    def has(self, kind: Kind) -> Truths:
        """Return which actions of a kind exist, as booleans of shape (stages, microbatches)."""
        exists: Truths = self.of[kind] >= 0
        return exists

    def index(self, kind: Kind) -> Table:
        """Return the indices into `flat` of the actions of a kind, or -1, in shape (stages, microbatches)."""
        return np.where(self.has(kind), self.of[kind] + self._starts, -1)

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
    for number, holder in enumerate(schedule.stage_to_rank):
        if not 0 <= holder < schedule.num_ranks:
            ranks = f"there are only {schedule.num_ranks} ranks"
            raise UsageError(f"schedule {schedule.name}: stage {number} is given to rank {holder}, and {ranks}")
    flat = flatten(schedule.actions)
    stage, k = flat.stage, flat.microbatch
    exists = (stage >= 0) & (stage < num_stages) & (k >= 0) & (k < num_microbatches)
    holders = np.array(schedule.stage_to_rank)
    at_home = exists & (holders[np.where(exists, stage, 0)] == flat.rank)
    if not at_home.all():
        index = int(np.argmin(at_home))
        raise _failure_at(schedule, flat, index, _misplaced(schedule, int(stage[index])))

    place = (flat.kind * num_stages + stage) * num_microbatches + k
    found = np.full(len(KINDS) * num_stages * num_microbatches, -1)
    indices = np.arange(len(place))
    found[place] = indices
    if (found[place] != indices).any():
        repeated = int(found[place[np.argmax(found[place] != indices)]])
        raise _failure_at(schedule, flat, repeated, "the action stands twice in the list")
    starts = flat.offsets[holders][:, None]
    tables = found.reshape(len(KINDS), num_stages, num_microbatches)
    tables = np.where(tables >= 0, tables - starts, -1)
    return Positions(dict(zip(KINDS, tables, strict=True)), flat, starts)


def _failure_at(schedule: Schedule, flat: Flat, index: int, rule: str) -> UsageError:
    rank = int(flat.rank[index])
    return failure(schedule, rank, index - int(flat.offsets[rank]), rule)


def _misplaced(schedule: Schedule, stage: int) -> str:
    if not 0 <= stage < schedule.num_stages:
        return f"there are only {schedule.num_stages} stages"
    holder = schedule.stage_to_rank[stage]
    return f"stage {stage} belongs to rank {holder}, or there are only {schedule.num_microbatches} microbatches"
