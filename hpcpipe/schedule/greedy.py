"""A schedule made for given costs and memory, by a list scheduler (Qi et al., arXiv 2401.10241, section 3)."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Action, Kind, Schedule
from hpcpipe.schedule.buffers import peak_stash
from hpcpipe.schedule.controllable_memory import v_half, v_min
from hpcpipe.schedule.dualpipe_v import dualpipe_v
from hpcpipe.schedule.gpipe import gpipe, looped_bfs
from hpcpipe.schedule.interleaved import interleaved, interleaved_zero_bubble
from hpcpipe.schedule.limits import stashes_within
from hpcpipe.schedule.list_scheduler import Arranged, Policy, arrange
from hpcpipe.schedule.one_forward_one_backward import eager_one_forward_one_backward, one_forward_one_backward
from hpcpipe.schedule.placement import looped, v_shaped
from hpcpipe.schedule.simulate import Costs, simulate
from hpcpipe.schedule.zb_v import zb_v
from hpcpipe.schedule.zero_bubble import zb_h1, zb_h2

_OVERHANGS = (0.0, 0.5, 0.9)
_PRECISION = 1e-9

_Candidate = Callable[[Costs, Sequence[float], float], Arranged | None]


def greedy(
    placement: Sequence[int], num_microbatches: int, costs: Costs, max_stash: Sequence[float] | None = None
) -> Schedule:
    """Build a schedule for given costs and memory.

    A simulation lets each free rank take a gradient of inputs if it can, else a forward if its stash has room, else a
    gradient of weights if it fits into the gap, if memory is full, or if nothing else is to come. It is run with
    several policies, and with the order of F and I of every fixed schedule of this placement; the result is the one
    with the smallest makespan, the fixed schedules themselves included, and the first of equal ones. So it is never
    worse than they are. See `list_scheduler` for why it always comes to its end.

    Parameters
    ----------
    placement : sequence of int
        The rank of each stage.
    num_microbatches : int
        Microbatches per step, at least 1.
    costs : Costs
        What actions and messages take, one number per stage and kind, 0 or more.
    max_stash : sequence of float, optional
        The most that each rank may stash, in activations of one microbatch through all its layers, at least 1; by
        default as many as there are ranks, which is the memory of 1F1B's first rank.

    Returns
    -------
    Schedule
        F, I and W, and B where I and W of a stage follow each other and nobody waits longer for it. The first stage's
        are always whole, as nobody waits for the gradient of its input.

    Raises
    ------
    UsageError
        If a rank may stash less than one microbatch through all its layers, or numbers are missing or negative.
    """
    num_ranks = max(placement) + 1
    limits = _limits(placement, [float(num_ranks)] * num_ranks if max_stash is None else max_stash)
    _check_costs(costs, len(placement))
    enough = _least_makespan(placement, num_microbatches, costs) * (1 + _PRECISION)
    makespan, lists = math.inf, tuple[tuple[Action, ...], ...]()
    for candidate in _candidates(tuple(placement), num_microbatches, costs.backward is not None):
        found = candidate(costs, limits, makespan * (1 - _PRECISION))
        if found is not None:
            makespan, lists = found
        if makespan <= enough:
            break
    if not lists:
        raise UsageError("schedule greedy: the times are too large to add up: give them in a larger unit")
    whole = tuple(map(_with_whole_first_stage, lists))
    return _with_whole_backwards(Schedule("greedy", num_microbatches, tuple(placement), whole), costs)


def _limits(placement: Sequence[int], max_stash: Sequence[float]) -> list[float]:
    """Return how many stashes, of one stage each, fit on each rank."""
    num_ranks = max(placement) + 1
    if len(max_stash) != num_ranks:
        raise UsageError(
            f"the limits of the stash are {len(max_stash)}, and there are {num_ranks} ranks: give one each"
        )
    for rank, limit in enumerate(max_stash):
        if not limit >= 1:
            raise UsageError(
                f"rank {rank} may stash {limit:g} activations, and cannot run with less than 1, one microbatch through"
                " all its layers: raise the limit"
            )
    return [stashes_within(limit, list(placement).count(rank)) for rank, limit in enumerate(max_stash)]


def _check_costs(costs: Costs, num_stages: int) -> None:
    for name in ("forward", "backward_input", "backward_weight", "backward"):
        numbers = getattr(costs, name)
        if numbers is None and name == "backward":
            continue
        if len(numbers) != num_stages or not all(0 <= number < math.inf for number in numbers):
            raise UsageError(f"costs.{name} is {list(numbers)}: give {num_stages} times, one per stage, 0 or more")
    if not 0 <= costs.message < math.inf:
        raise UsageError(f"costs.message is {costs.message}: give the time that a message takes, 0 or more")


def _least_makespan(placement: Sequence[int], num_microbatches: int, costs: Costs) -> float:
    """Return what no order can beat: a rank's whole work after the first microbatch has come to it."""
    times = costs.by_kind()
    halves = map(sum, zip(times[Kind.I], times[Kind.W], strict=True))
    per_stage = [f + min(b, h) for f, b, h in zip(times[Kind.F], times[Kind.B], halves, strict=True)]
    arrives: dict[int, float] = {}
    time = 0.0
    for stage, rank in enumerate(placement):
        if stage > 0 and placement[stage - 1] != rank:
            time += costs.message
        arrives.setdefault(rank, time)
        time += costs.forward[stage]
    work = dict.fromkeys(arrives, 0.0)
    for stage, rank in enumerate(placement):
        work[rank] += per_stage[stage] * num_microbatches
    return max(arrives[rank] + work[rank] for rank in arrives)


def _candidates(placement: tuple[int, ...], num_microbatches: int, has_whole_costs: bool) -> Iterator[_Candidate]:
    """Return ways to make a schedule: the fixed orders with W placed anew, the fixed schedules, and free choices.

    Where a whole backward costs less than its halves, they also try whole ones, with halves for the last microbatches
    only, whose W fill the gaps at the end.
    """
    p, m = max(placement) + 1, num_microbatches
    starts = (0, m, m - p // 2, m - p, m - 2 * p) if has_whole_costs else (0,)
    whole_before = [start for at, start in enumerate(starts) if start >= 0 and start not in starts[:at]]
    seen = set()
    for fixed in _fixed(placement, m):
        orders = tuple(map(_order, fixed.actions))
        if orders not in seen:
            seen.add(orders)
            for start, overhang, late in product(whole_before, _OVERHANGS, (True, False)):
                yield partial(arrange, placement, m, Policy(True, 0.0, overhang, late, start), orders)
        yield partial(_as_it_is, fixed)
    for start, alternate, patience in product(whole_before, (True, False), (0.0, 0.5)):
        for overhang, late in product(_OVERHANGS, (True, False)):
            yield partial(arrange, placement, m, Policy(alternate, patience, overhang, late, start), None)


def _as_it_is(fixed: Schedule, costs: Costs, limits: Sequence[float], below: float) -> Arranged | None:
    """Return a fixed schedule if it keeps the limits and has a makespan below a bound."""
    stages = [fixed.stage_to_rank.count(rank) for rank in range(fixed.num_ranks)]
    peaks = [round(peak * count) for peak, count in zip(peak_stash(fixed), stages, strict=True)]
    if any(peak > limit for peak, limit in zip(peaks, limits, strict=True)):
        return None
    makespan = simulate(fixed, costs).makespan
    return (makespan, fixed.actions) if makespan < below else None


def _order(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Return the order of a list's forwards and input gradients."""
    return tuple(
        action._replace(kind=Kind.I) if action.kind is Kind.B else action
        for action in actions
        if action.kind is not Kind.W
    )


def _fixed(placement: tuple[int, ...], num_microbatches: int) -> Iterator[Schedule]:
    """Make the fixed schedules of a placement that exist for this number of microbatches."""
    num_ranks = max(placement) + 1
    chunks = len(placement) // num_ranks
    if placement == looped(num_ranks, 1):
        for make in (zb_h1, one_forward_one_backward, zb_h2, eager_one_forward_one_backward, gpipe):
            yield make(num_ranks, num_microbatches)
    if placement == v_shaped(num_ranks):
        for make in (zb_v, v_half, v_min):
            yield make(num_ranks, num_microbatches)
        if num_microbatches >= 2 * num_ranks:
            yield dualpipe_v(num_ranks, num_microbatches)
    if chunks > 1 and placement == looped(num_ranks, chunks):
        if num_microbatches % max(1, num_microbatches // num_ranks) == 0:
            yield interleaved_zero_bubble(num_ranks, num_microbatches, chunks)
            yield interleaved(num_ranks, num_microbatches, chunks)
        yield looped_bfs(num_ranks, num_microbatches, chunks)


def _with_whole_first_stage(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Put the first stage's I beside its W, as one B: what stands between them starts earlier, and nothing later."""
    return tuple(
        action._replace(kind=Kind.B) if action.stage == 0 and action.kind is Kind.W else action
        for action in actions
        if action.stage > 0 or action.kind is not Kind.I
    )


def _with_whole_backwards(schedule: Schedule, costs: Costs) -> Schedule:
    """Make one B of I and W that follow each other, where no action starts later for it."""
    timeline = simulate(schedule, costs)
    whole = costs.by_kind()[Kind.B]
    starts = {
        action[1:]: start
        for actions, times in zip(schedule.actions, timeline.starts, strict=True)
        for action, start in zip(actions, times, strict=True)
        if action.kind in (Kind.I, Kind.B)
    }
    lists = []
    for actions, ends in zip(schedule.actions, timeline.ends, strict=True):
        fused: list[Action] = []
        for action, end in zip(actions, ends, strict=True):
            kind, stage, k = action
            if kind is Kind.W and fused and fused[-1] == (Kind.I, stage, k):
                done = starts[stage, k] + whole[stage]
                there = done + (costs.message if schedule.input_crosses(stage) else 0.0)
                if end >= done * (1 - _PRECISION) and starts[stage - 1, k] >= there * (1 - _PRECISION):
                    fused[-1] = Action(Kind.B, stage, k)
                    continue
            fused.append(action)
        lists.append(tuple(fused))
    return Schedule(schedule.name, schedule.num_microbatches, schedule.stage_to_rank, tuple(lists))
