"""All lists of a schedule as arrays, one list after the other, for what looks at every action."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from hpcpipe.schedule.action import COMPUTE, Action, Kind

Table = npt.NDArray[np.int64]
Truths = npt.NDArray[np.bool_]
Times = npt.NDArray[np.float64]

KINDS = tuple(Kind)
_CODES = {kind: code for code, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Flat:
    """Actions as arrays; an index counts through the lists of all ranks, rank 0 first.

    Attributes
    ----------
    kind : ndarray of int64, shape (actions,)
        Where an action's kind stands in `KINDS`.
    stage, microbatch, rank : ndarray of int64, shape (actions,)
        The rest of an action, and the rank whose list it stands in.
    offsets : ndarray of int64, shape (ranks + 1,)
        The index at which each rank's list starts; the last is the number of actions.
    """

    kind: Table
    stage: Table
    microbatch: Table
    rank: Table
    offsets: Table

    def is_any(self, *kinds: Kind) -> Truths:
        """Return which actions are of one of some kinds."""
        wanted = np.zeros(len(KINDS), np.bool_)
        wanted[[_CODES[kind] for kind in kinds]] = True
        return wanted[self.kind]

    def compute(self) -> "Flat":
        """Return the compute actions alone."""
        kept = self.is_any(*COMPUTE)
        before = np.concatenate(([0], np.cumsum(kept)))
        return Flat(self.kind[kept], self.stage[kept], self.microbatch[kept], self.rank[kept], before[self.offsets])

    def find(self, kind: Kind, num_stages: int, num_microbatches: int) -> Table:
        """Return the index of each action of a kind, or -1, as an array of shape (stages, microbatches)."""
        table = np.full((num_stages, num_microbatches), -1)
        indices = np.flatnonzero(self.kind == _CODES[kind])
        table[self.stage[indices], self.microbatch[indices]] = indices
        return table


def flatten(lists: Sequence[Sequence[Action]]) -> Flat:
    """Return the lists of all ranks as arrays."""
    offsets = np.concatenate(([0], np.cumsum([len(actions) for actions in lists], dtype=np.int64)))
    actions = list(chain.from_iterable(lists))
    return Flat(
        kind=np.fromiter(map(_CODES.__getitem__, map(itemgetter(0), actions)), np.int64, len(actions)),
        stage=np.fromiter(map(itemgetter(1), actions), np.int64, len(actions)),
        microbatch=np.fromiter(map(itemgetter(2), actions), np.int64, len(actions)),
        rank=np.repeat(np.arange(len(lists)), np.diff(offsets)),
        offsets=offsets,
    )
