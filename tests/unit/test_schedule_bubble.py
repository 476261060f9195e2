"""The parts of the bubble."""

import random

import pytest

from hpcpipe.errors import UsageError
from hpcpipe.schedule.bubble import split_bubble
from hpcpipe.schedule.build import GENERATORS, build
from hpcpipe.schedule.simulate import Costs, simulate


@pytest.mark.parametrize("name", GENERATORS)
def test_parts_add_up_for_every_rank_and_for_the_whole(name):
    dice = random.Random(f"{name} bubble")
    for p, m in ((1, 2), (2, 4), (4, 8), (3, 6)):
        schedule = build(name, p, m)
        stages = range(schedule.num_stages)
        costs = Costs(*([dice.random() for _ in stages] for _ in range(3)), message=dice.choice([0, 0.2, 3]))
        timeline, parts = simulate(schedule, costs), split_bubble(schedule, costs)
        idle = [timeline.makespan - busy for busy in timeline.busy]
        found = [sum(part) for part in zip(parts.schedule, parts.imbalance, parts.messages, strict=True)]
        assert found == pytest.approx(idle, abs=1e-12)
        assert sum(parts.whole) == pytest.approx(timeline.bubble, abs=1e-12)
        assert min(parts.messages) >= 0 and min(parts.schedule) >= -1e-12
        assert costs.message > 0 or parts.messages == (0,) * p


@pytest.mark.parametrize("name", GENERATORS)
def test_equal_stages_and_free_messages_leave_the_schedule_alone(name):
    schedule = build(name, 4, 8)
    costs = Costs.uniform(schedule, 1, 1.3, 0.7)
    parts = split_bubble(schedule, costs)
    assert parts.whole == (pytest.approx(simulate(schedule, costs).bubble), pytest.approx(0), 0)


def test_each_cause_stands_in_its_part():
    schedule = build("1f1b", 4, 16)
    assert split_bubble(schedule, Costs.uniform(schedule, message=0.1)).whole == pytest.approx((9, 0, 2.8))
    slow = [1.0, 1.0, 1.0, 1.25]
    parts = split_bubble(schedule, Costs(slow, slow, slow))
    # The mean action takes 1.0625, and the bubble is 18 in all.
    assert parts.whole == pytest.approx((9 * 1.0625, 18 - 9 * 1.0625, 0))
    assert parts.imbalance[3] < 0 < parts.imbalance[0]
    whole = split_bubble(schedule, Costs(slow, slow, slow, 0.1, backward=[1.5] * 4)).whole
    assert whole[0] == pytest.approx(3 * (1.0625 + 1.5))


def test_a_schedule_that_hangs_is_refused():
    program = build("1f1b", 2, 2)
    lists = (tuple(reversed(program.actions[0])), program.actions[1])
    with pytest.raises(UsageError, match="waits for ever"):
        split_bubble(type(program)("hangs", 2, (0, 1), lists), Costs.uniform(program))
