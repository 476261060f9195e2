"""The measure of the executor's own cost walks every schedule, counts every action, and leaves waiting out."""

import time

import pytest

from hpcpipe.pipeline.action_cost import POLL, InstantTransport, measure
from hpcpipe.schedule.action import COMPUTE, Schedule
from hpcpipe.schedule.build import GENERATORS, build

REPETITIONS = 3


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "forward"])
def test_every_action_of_every_schedule_is_timed(name):
    schedule = build(name, 3, 6)
    cost = measure(schedule, [0, 1, 2], InstantTransport(), REPETITIONS)
    actions = [action for actions in schedule.actions for action in actions]
    assert cost.num_actions == len(actions)
    assert len(cost.action_s) == REPETITIONS and min(cost.action_s) > 0
    for kind in {action.kind for action in actions}:
        # The walk that does not count is timed action by action too.
        assert len(cost.spent_s[kind]) == (REPETITIONS + 1) * sum(action.kind is kind for action in actions)
    num_computes = sum(action.kind in COMPUTE for action in actions)
    assert len(cost.spent_s.pop(POLL)) == (REPETITIONS + 1) * num_computes
    assert set(cost.spent_s) == {action.kind for action in actions}


class SlowTransport(InstantTransport):
    """Every wait takes a millisecond, and is told or not."""

    def __init__(self, tells):
        self.waited_s = 0.0
        self.tells = tells

    def wait(self, action):
        start = time.perf_counter()
        time.sleep(1e-3)
        self.waited_s += (time.perf_counter() - start) * self.tells


def test_waiting_does_not_count():
    schedule = build("1f1b", 2, 4)
    untold, told = (
        measure(schedule, [0], transport, REPETITIONS, lambda transport=transport: transport.waited_s)
        for transport in (SlowTransport(False), SlowTransport(True))
    )
    num_waits = sum(action.kind in ("B", "SEND_F") for action in schedule.actions[0])
    assert num_waits == 8
    assert min(untold.action_s) * untold.num_actions > num_waits * 0.9e-3
    assert min(told.action_s) * told.num_actions < num_waits * 0.5e-3
    assert min(untold.spent_s["B"]) > 0.9e-3 > min(told.spent_s["B"])


def test_ranks_meet_before_every_walk():
    meetings = []
    measure(build("gpipe", 1, 2), [0], InstantTransport(), REPETITIONS, meet=lambda: meetings.append(1))
    assert len(meetings) == 2 * (REPETITIONS + 1)


def test_no_action_searches_the_lists(monkeypatch):
    def refuse(schedule):
        raise AssertionError("the lists of all ranks are searched for a backward")

    def meet():
        monkeypatch.setattr(Schedule, "is_forward_only", property(refuse))

    measure(build("gpipe", 2, 3), [0, 1], InstantTransport(), 1, meet=meet)
