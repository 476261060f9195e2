"""The schedule that is made for given costs and memory."""

import random
import time
from dataclasses import replace

import pytest

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Action, Kind
from hpcpipe.schedule.buffers import peak_stash
from hpcpipe.schedule.build import build, generate
from hpcpipe.schedule.check import check
from hpcpipe.schedule.greedy import greedy
from hpcpipe.schedule.lower import lower
from hpcpipe.schedule.placement import looped, v_shaped
from hpcpipe.schedule.simulate import Costs, simulate

COSTS = {
    "even": (1, 1, 1, 0),
    "long input half": (1, 1.3, 0.7, 0),
    "recompute": (1, 2, 1, 0),
    "slow messages": (1, 1, 1, 0.1),
}
FIXED = {
    "linear": (1, ("gpipe", "1f1b", "eager-1f1b", "zb-h1", "zb-h2")),
    "v": (2, ("zb-v", "v-half", "v-min", "dualpipe-v")),
    "looped": (3, ("looped-bfs", "interleaved", "interleaved-zb")),
}


def with_last_stage_slower(costs, factor):
    slower = [[*row[:-1], row[-1] * factor] for row in (costs.forward, costs.backward_input, costs.backward_weight)]
    return Costs(*slower, costs.message)


def placement_of(name, p):
    return {"linear": looped(p, 1), "v": v_shaped(p), "looped": looped(p, 3)}[name]


@pytest.mark.parametrize("shape", FIXED)
def test_never_worse_than_the_fixed_schedules_of_the_same_memory(shape):
    chunks, names = FIXED[shape]
    for p, m in ((1, 3), (2, 4), (4, 8), (3, 12)):
        placement = placement_of(shape, p)
        for times in COSTS.values():
            for factor, whole in ((1, None), (1.25, None), (1, 0.8)):
                costs = with_last_stage_slower(Costs.even(p, p * chunks, *times), factor)
                if whole is not None:
                    costs = replace(costs, backward=[whole * time for time in costs.by_kind()[Kind.B]])
                for name in names:
                    fixed = generate(name, p, m, chunks)
                    limit = peak_stash(fixed)
                    found = greedy(placement, m, costs, [max(1, stash) for stash in limit])
                    check(lower(found))
                    assert all(a <= max(1, b) for a, b in zip(peak_stash(found), limit, strict=True))
                    bound = simulate(fixed, costs).makespan * (1 + 1e-9)
                    assert simulate(found, costs).makespan <= bound, (name, p, m, times, factor, whole)


def test_better_than_zb_v_where_costs_are_unequal():
    costs = with_last_stage_slower(Costs.even(4, 8), 1.25)
    assert simulate(generate("zb-v", 4, 8), costs).bubble == pytest.approx(3.125)
    assert simulate(greedy(v_shaped(4), 8, costs), costs).bubble <= 2.25 + 1e-9


@pytest.mark.parametrize(("shape", "bound"), [("linear", 64.5), ("v", 61.5)])
def test_whole_backwards_are_used_where_they_cost_less_than_their_halves(shape, bound):
    chunks, names = FIXED[shape]
    placement = placement_of(shape, 4)
    times = [[time / chunks] * len(placement) for time in (1, 1.5, 1.5)]
    costs = Costs(*times, backward=[2.5 / chunks] * len(placement))
    found = greedy(placement, 16, costs)
    check(lower(found), [4] * 4)
    makespan = simulate(found, costs).makespan
    assert makespan <= bound
    for name in names:
        fixed = generate(name, 4, 16)
        if max(peak_stash(fixed)) <= 4:
            assert makespan < simulate(fixed, costs).makespan
    kinds = {action.kind for actions in found.actions for action in actions}
    assert kinds == {Kind.F, Kind.B, Kind.I, Kind.W}


def test_the_bubble_of_the_zero_bubble_papers():
    for chunks, bubble in ((1, 3), (2, 1.5), (4, 0.75)):
        schedule = build("greedy", 4, 8, chunks)
        assert simulate(schedule, Costs.uniform(schedule)).bubble == bubble
        assert max(peak_stash(schedule)) <= 4


def test_more_memory_is_used_where_it_helps():
    costs = Costs.even(4, 4, message=0.5)
    bubbles = [simulate(greedy(looped(4, 1), 16, costs, [limit] * 4), costs).bubble for limit in (1, 2, 4, 7)]
    assert bubbles == sorted(bubbles, reverse=True) and len(set(bubbles)) == 4


def random_case(dice):
    p, m = dice.randint(1, 6), dice.randint(1, 14)
    more = [dice.randrange(p) for _ in range(dice.randint(0, 5))]
    shuffled = dice.sample(range(p), p)
    placement = dice.choice([looped(p, 1), v_shaped(p), looped(p, 3), (*range(p), *more), (*shuffled, *more)])

    def times():
        return [dice.choice([0, 1, 2 * dice.random()]) for _ in placement]

    whole = dice.choice([None, None, times()])
    costs = Costs(times(), times(), times(), dice.choice([0, 0, 0.1, 1.5]), whole)
    limits = dice.choice([None, [1 + dice.random() * dice.choice([0, 1, p]) for _ in range(p)]])
    return p, m, placement, costs, limits


@pytest.mark.parametrize("seed", range(150))
def test_any_costs_placement_and_memory(seed):
    p, m, placement, costs, limits = random_case(random.Random(seed))
    schedule = greedy(placement, m, costs, limits)
    check(lower(schedule))
    for peak, limit in zip(peak_stash(schedule), limits or [p] * p, strict=True):
        assert peak <= limit * (1 + 1e-9)
    assert greedy(placement, m, costs, limits) == schedule
    for stage, rank in enumerate(placement):
        for kinds in ((Kind.F,), (Kind.B, Kind.I)):
            counts = [a.microbatch for a in schedule.actions[rank] if a.stage == stage and a.kind in kinds]
            assert counts == list(range(m))


def test_first_stage_is_whole_and_nobody_waits_longer_for_other_whole_backwards():
    for seed in range(30):
        _, m, placement, costs, limits = random_case(random.Random(seed))
        costs = replace(costs, backward=None)
        schedule = greedy(placement, m, costs, limits)
        actions = [action for actions in schedule.actions for action in actions]
        assert all(action.kind in (Kind.F, Kind.B) for action in actions if action.stage == 0)
        halved = [[half for action in actions for half in halves(action)] for actions in schedule.actions]
        apart = type(schedule)("halves", m, schedule.stage_to_rank, tuple(map(tuple, halved)))
        assert simulate(schedule, costs).makespan == pytest.approx(simulate(apart, costs).makespan)


def halves(action):
    return [Action(k, *action[1:]) for k in (Kind.I, Kind.W)] if action.kind is Kind.B else [action]


def test_a_stash_below_what_can_run_and_wrong_numbers_are_refused():
    costs = Costs.even(2, 4)
    with pytest.raises(UsageError, match=r"rank 1 may stash 0.5 activations, and cannot run with less than 1"):
        greedy(v_shaped(2), 4, costs, [1, 0.5])
    with pytest.raises(UsageError, match=r"limits of the stash are 1, and there are 2 ranks"):
        greedy(v_shaped(2), 4, costs, [1])
    with pytest.raises(UsageError, match=r"costs.forward is .* give 2 times, one per stage"):
        greedy(looped(2, 1), 4, costs)
    with pytest.raises(UsageError, match=r"costs.message is -1"):
        greedy(v_shaped(2), 4, Costs.even(2, 4, message=-1))
    assert max(peak_stash(greedy(v_shaped(2), 4, costs, [float("inf")] * 2))) <= 4


def test_64_ranks_take_seconds():
    start = time.process_time()
    greedy(looped(64, 1), 256, Costs.even(64, 64, 1, 1.3, 0.7, 0.1))
    assert time.process_time() - start < 30
