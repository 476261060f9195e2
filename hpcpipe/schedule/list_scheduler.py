"""Putting actions into order by a clock: a free rank starts what it can, by a policy of what comes first.

No choice of a policy leads into a deadlock. Of the v stages of a rank the c-th, counted from 0, starts a forward only
if that leaves v - 1 - c stashes free. Suppose that nothing can start, and take a live stash of the latest stage s. Its
gradient is missing, so stage s + 1 has not run the forward of its microbatch, has an input (microbatches ascend), and
lacks room on its rank, whose c-th stage it is. All live stashes there are of earlier stages, as s is the latest; the
last of them left at least v - c stashes free when it was made, and all others were alive then. So v - c are free, and
stage s + 1 needs only v - 1 - c besides its own. If no stash is alive, the first stage can start.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from hpcpipe.schedule.action import Action, Kind
from hpcpipe.schedule.simulate import Costs

_NEVER = float("inf")
_PRECISION = 1e-9

Arranged = tuple[float, tuple[tuple[Action, ...], ...]]
"""A makespan, and the list of each rank."""


@dataclass(frozen=True)
class Policy:
    """What a free rank prefers.

    Attributes
    ----------
    alternate : bool
        Forward after backward and backward after forward, where both can start; otherwise backwards first.
    patience : float
        A forward is not started if a gradient is known to arrive within this share of its time.
    overhang : float
        A weight gradient may begin in a gap that is too short for it by this share of its time.
    first_stage_late : bool
        The first stage's whole backward, for which nobody waits, fills gaps as weight gradients do.
    whole_before : int
        The backwards of microbatches below this are whole.
    """

    alternate: bool
    patience: float
    overhang: float
    first_stage_late: bool
    whole_before: int = 0


@dataclass(slots=True)
class _Rank:
    """What a rank has done and what it could do."""

    number: int
    stages: list[int]
    limit: float
    order: deque[Action] | None
    # The time of everything that it has yet to start.
    work: float
    free_at: float = 0.0
    stashes: int = 0
    was_forward: bool = False
    actions: list[Action] = field(default_factory=list)
    # Weight gradients that can run, oldest first.
    pending: deque[Action] = field(default_factory=deque)


def arrange(
    placement: Sequence[int],
    num_microbatches: int,
    policy: Policy,
    orders: Sequence[Sequence[Action]] | None,
    costs: Costs,
    limits: Sequence[float],
    below: float = _NEVER,
) -> Arranged | None:
    """Run a simulation in which the ranks choose what to do next.

    Parameters
    ----------
    placement : sequence of int
        The rank of each stage.
    num_microbatches : int
        Microbatches per step.
    policy : Policy
        What a rank prefers.
    orders : sequence of sequence of Action, optional
        An order of F and I for each rank, which is kept; without it, the ranks choose that too.
    costs : Costs
        What actions and messages take.
    limits : sequence of float
        The most stashes, over all its stages, that each rank may hold.
    below : float
        Give up when the makespan cannot be less.

    Returns
    -------
    Arranged or None
        F, I, W, and B of the first stage; None if the order cannot be kept within the limits, or the makespan is not
        below the bound.
    """
    scheduler = _Scheduler(placement, num_microbatches, policy, orders, costs, limits)
    return scheduler.run(below)


class _Scheduler:
    """The state of the simulation; parameters as in `arrange`."""

    def __init__(
        self,
        placement: Sequence[int],
        num_microbatches: int,
        policy: Policy,
        orders: Sequence[Sequence[Action]] | None,
        costs: Costs,
        limits: Sequence[float],
    ) -> None:
        num_stages = len(placement)
        self._placement = placement
        self._policy = policy
        self._times = costs.by_kind()
        self._message = costs.message
        self._tolerance = _PRECISION * max(map(max, self._times.values()))
        # When the next inputs and gradients of each stage are there, oldest first; unknown ones are not listed.
        self._inputs: list[deque[float]] = [deque() for _ in range(num_stages)]
        self._inputs[0].extend([0.0] * num_microbatches)
        self._gradients: list[deque[float]] = [deque() for _ in range(num_stages)]
        self._next = {kind: [0] * num_stages for kind in (Kind.F, Kind.I)}
        self._num_left = 3 * num_stages * num_microbatches
        self._events: list[tuple[float, int]] = []
        held: list[list[int]] = [[] for _ in limits]
        for stage, rank in enumerate(placement):
            held[rank].append(stage)
        per_stage = [
            num_microbatches * self._times[Kind.F][stage]
            + sum(self._backward_time(stage, k) for k in range(num_microbatches))
            for stage in range(num_stages)
        ]
        self._ranks = [
            _Rank(
                rank,
                stages,
                limit,
                None if orders is None else self._without_late(rank, orders[rank]),
                sum(per_stage[stage] for stage in stages),
            )
            for rank, (stages, limit) in enumerate(zip(held, limits, strict=True))
        ]

    def run(self, below: float) -> Arranged | None:
        self._events = [(0.0, number) for number in range(len(self._ranks))]
        while self._events:
            now, number = heappop(self._events)
            rank = self._ranks[number]
            if rank.free_at > now:
                continue
            if self._policy.first_stage_late and number == self._placement[0]:
                self._keep_for_later(rank, now)
            action = self._free_choice(rank, now) if rank.order is None else self._next_in_order(rank, now)
            if action is not None:
                if now + rank.work >= below:
                    return None
                self._start(rank, action, now)
        if self._num_left > 0:
            return None
        return max(rank.free_at for rank in self._ranks), tuple(tuple(rank.actions) for rank in self._ranks)

    def _backward_time(self, stage: int, microbatch: int) -> float:
        if self._is_whole(stage, microbatch):
            return self._times[Kind.B][stage]
        return self._times[Kind.I][stage] + self._times[Kind.W][stage]

    def _without_late(self, rank: int, order: Sequence[Action]) -> deque[Action]:
        if not self._policy.first_stage_late or rank != self._placement[0]:
            return deque(order)
        return deque(action for action in order if not (action.kind is Kind.I and action.stage == 0))

    def _keep_for_later(self, rank: _Rank, now: float) -> None:
        """Put the first stage's backwards that could run with the weight gradients."""
        arrived = self._gradients[0]
        while arrived and arrived[0] <= now + self._tolerance:
            arrived.popleft()
            rank.pending.append(self._take(Kind.B, 0))

    def _next_in_order(self, rank: _Rank, now: float) -> Action | None:
        if not rank.order:
            return self._weights(rank)
        action = rank.order[0]
        is_forward = action.kind is Kind.F
        if is_forward and rank.stashes >= rank.limit:
            return self._weights(rank)
        arrivals = (self._inputs if is_forward else self._gradients)[action.stage]
        if not arrivals or arrivals[0] > now + self._tolerance:
            return self._weights(rank, arrivals[0] - now if arrivals else _NEVER)
        arrivals.popleft()
        rank.order.popleft()
        if is_forward or not self._is_whole(action.stage, action.microbatch):
            return action
        return action._replace(kind=Kind.B)

    def _free_choice(self, rank: _Rank, now: float) -> Action | None:
        policy, until = self._policy, now + self._tolerance
        forward = backward = None
        is_blocked = False
        next_input = next_gradient = _NEVER
        room = rank.limit - rank.stashes
        for num_later, stage in enumerate(reversed(rank.stages)):
            inputs, gradients = self._inputs[stage], self._gradients[stage]
            if gradients and gradients[0] > until:
                next_gradient = min(next_gradient, gradients[0])
            elif gradients and backward is None:
                backward = stage
            if inputs and inputs[0] > until:
                next_input = min(next_input, inputs[0])
            elif inputs and room <= num_later:
                is_blocked = True
            elif inputs and forward is None:
                forward = stage
        if backward is not None and not (policy.alternate and not rank.was_forward and forward is not None):
            if policy.alternate and is_blocked and rank.pending and not rank.was_forward:
                return self._weights(rank)
            return self._accept(Kind.I, backward)
        if forward is not None and next_gradient - now >= policy.patience * self._times[Kind.F][forward]:
            return self._accept(Kind.F, forward)
        return self._weights(rank, _NEVER if is_blocked else min(next_input, next_gradient) - now)

    def _weights(self, rank: _Rank, gap: float = _NEVER) -> Action | None:
        """Return the oldest weight gradient, if there is one and it fits into a gap."""
        if not rank.pending:
            return None
        action = rank.pending[0]
        needed = self._times[action.kind][action.stage] * (1 - self._policy.overhang)
        return rank.pending.popleft() if needed <= gap + self._tolerance else None

    def _accept(self, kind: Kind, stage: int) -> Action:
        """Use up what an action waited for."""
        (self._inputs if kind is Kind.F else self._gradients)[stage].popleft()
        is_whole = kind is Kind.I and self._is_whole(stage, self._next[Kind.I][stage])
        return self._take(Kind.B if is_whole else kind, stage)

    def _is_whole(self, stage: int, microbatch: int) -> bool:
        return stage == 0 or microbatch < self._policy.whole_before

    def _take(self, kind: Kind, stage: int) -> Action:
        counted = self._next[Kind.F if kind is Kind.F else Kind.I]
        counted[stage] += 1
        return Action(kind, stage, counted[stage] - 1)

    def _start(self, rank: _Rank, action: Action, now: float) -> None:
        kind, stage, k = action
        time = self._times[kind][stage]
        end = now + time
        rank.actions.append(action)
        self._num_left -= 1
        rank.work -= time
        rank.free_at = end
        heappush(self._events, (end, rank.number))
        if kind is Kind.W:
            rank.stashes -= 1
            return
        rank.was_forward = kind is Kind.F
        if kind is Kind.F:
            rank.stashes += 1
            if stage + 1 < len(self._placement):
                self._deliver(self._inputs[stage + 1], rank, self._placement[stage + 1], end)
            else:
                self._gradients[stage].append(end)
            return
        if kind is Kind.I:
            rank.pending.append(Action(Kind.W, stage, k))
        else:
            self._num_left -= 1
            rank.stashes -= 1
        if stage > 0:
            self._deliver(self._gradients[stage - 1], rank, self._placement[stage - 1], end)

    def _deliver(self, arrivals: deque[float], sender: _Rank, receiver: int, end: float) -> None:
        if receiver == sender.number:
            arrivals.append(end)
            return
        arrival = end + self._message
        arrivals.append(arrival)
        # A receiver that is busy then looks around when it has finished.
        if self._ranks[receiver].free_at <= arrival:
            heappush(self._events, (arrival, receiver))
