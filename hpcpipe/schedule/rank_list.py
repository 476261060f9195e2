"""Writing down a rank's list, microbatch after microbatch."""

from collections import Counter, deque

from hpcpipe.schedule.action import Action, Kind

_COUNTED_AS = {Kind.B: Kind.I}


class RankList:
    """A list of actions in which every (kind, stage) runs its microbatches in ascending order.

    Parameters
    ----------
    num_microbatches : int
        Actions beyond the last microbatch are left out, so that a pattern may run over the end.

    Attributes
    ----------
    actions : list of Action
        What has been written so far.
    """

    def __init__(self, num_microbatches: int) -> None:
        self.actions: list[Action] = []
        self._num_microbatches = num_microbatches
        self._next: Counter[tuple[Kind, int]] = Counter()
        self._pending: deque[Action] = deque()

    def count(self, kind: Kind, stage: int) -> int:
        """Return how many microbatches a stage has run so far, those left out included; B and I count together."""
        return self._next[_COUNTED_AS.get(kind, kind), stage]

    def add(self, kind: Kind, stage: int) -> None:
        """Write the next microbatch of a kind on a stage."""
        counted = (_COUNTED_AS.get(kind, kind), stage)
        k = self._next[counted]
        self._next[counted] = k + 1
        if k < self._num_microbatches:
            self.actions.append(Action(kind, stage, k))

    def postpone(self, stage: int) -> None:
        """Write the next input gradient of a stage, and keep its weight gradient for later."""
        k = self.count(Kind.I, stage)
        self.add(Kind.I, stage)
        if k < self._num_microbatches:
            self._pending.append(Action(Kind.W, stage, k))

    def weights(self, at_most: int | None = None) -> None:
        """Write the oldest postponed weight gradients, all of them or at most some."""
        count = len(self._pending) if at_most is None else min(at_most, len(self._pending))
        for _ in range(count):
            self.actions.append(self._pending.popleft())
