"""Schedules: golden traces, completeness, order, deadlock freedom, and a checker that refuses broken ones."""

import itertools
import random

import pytest

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import COMPUTE, Action, Kind, Schedule
from hpcpipe.schedule.buffers import count_buffers, peak_stash
from hpcpipe.schedule.build import GENERATORS, build
from hpcpipe.schedule.check import check
from hpcpipe.schedule.lower import lower

RANKS = (1, 2, 3, 4, 5, 8)


def microbatch_counts(num_ranks):
    return sorted({1, 2, 3, num_ranks, 2 * num_ranks - 1, 2 * num_ranks, 2 * num_ranks + 1, 4 * num_ranks})


CASES = [(name, p, m) for name in GENERATORS for p in RANKS for m in microbatch_counts(p)]


def compute(schedule, rank):
    return " ".join(str(action) for action in schedule.actions[rank] if action.kind in COMPUTE)


def test_golden_trace_of_1f1b():
    program = build("1f1b", 4, 6)
    assert compute(program, 0) == "F0.0 F0.1 F0.2 F0.3 B0.0 F0.4 B0.1 F0.5 B0.2 B0.3 B0.4 B0.5"
    assert compute(program, 3) == "F3.0 B3.0 F3.1 B3.1 F3.2 B3.2 F3.3 B3.3 F3.4 B3.4 F3.5 B3.5"


def test_golden_trace_of_gpipe():
    assert compute(build("gpipe", 2, 3), 1) == "F1.0 F1.1 F1.2 B1.0 B1.1 B1.2"


def test_lowering_posts_receives_before_the_previous_send():
    text = " ".join(str(action) for action in build("1f1b", 2, 3).actions[0])
    assert text == ("F0.0 SEND_F0.0 RECV_B0.0 F0.1 SEND_F0.1 B0.0 RECV_B0.1 F0.2 SEND_F0.2 RECV_B0.2 B0.1 B0.2")


@pytest.mark.parametrize(("name", "p", "m"), CASES)
def test_every_generator_is_proven(name, p, m):
    program = build(name, p, m)
    assert program.num_ranks == p and program.num_microbatches == m


@pytest.mark.parametrize("p", RANKS)
def test_peak_stash(p):
    for m in microbatch_counts(p):
        assert peak_stash(build("1f1b", p, m)) == [min(m, p - rank) for rank in range(p)]
        assert peak_stash(build("gpipe", p, m)) == [m] * p
        assert count_buffers(build("forward", p, m), 0).stashes == 1


def test_stream_counts():
    assert count_buffers(build("1f1b", 1, 4), 0).streams == 1 + 2
    assert count_buffers(build("forward", 2, 9), 1).streams == 2 + 2
    assert count_buffers(build("gpipe", 2, 5), 0).streams == 5 + 2 + 2


def test_actions_read_back():
    for kind, stage, k in itertools.product(Kind, (0, 12), (0, 305)):
        action = Action(kind, stage, k)
        assert Action.parse(str(action)) == action
    for text in ("", "F", "F1", "X0.0", "F-1.0", "F0.0.0", "F 0.0"):
        with pytest.raises(UsageError, match="not an action"):
            Action.parse(text)


def test_unknown_name_and_numbers_are_refused():
    with pytest.raises(UsageError, match="no schedule 'pipe'"):
        build("pipe", 2, 2)
    with pytest.raises(UsageError, match="at least 1"):
        build("1f1b", 2, 0)


def with_list(schedule, rank, actions):
    lists = list(schedule.actions)
    lists[rank] = tuple(actions)
    return Schedule(schedule.name, schedule.num_microbatches, schedule.stage_to_rank, tuple(lists))


def test_blocking_sends_would_deadlock_without_receives_posted_ahead():
    with pytest.raises(UsageError, match="deadlock"):
        check(lower(GENERATORS["1f1b"](2, 4), ahead=0))


def test_errors_name_rank_position_and_rule():
    program = build("1f1b", 2, 3)
    swapped = list(program.actions[1])
    first, second = (swapped.index(Action(Kind.B, 1, k)) for k in (1, 2))
    swapped[first], swapped[second] = swapped[second], swapped[first]
    with pytest.raises(UsageError, match=r"rank 1, position \d+, B1.2: F1.2 must come first"):
        check(with_list(program, 1, swapped))


def mutants(program, generator):
    """Break a schedule in one place: drop, repeat, move to another rank, or rename an action."""
    rank = generator.randrange(program.num_ranks)
    actions = list(program.actions[rank])
    position = generator.randrange(len(actions))
    how = generator.choice(("drop", "repeat", "rename", "foreign"))
    action = actions[position]
    if how == "drop":
        del actions[position]
    elif how == "repeat":
        actions.insert(generator.randrange(len(actions)), action)
    elif how == "rename":
        other = Action(action.kind, action.stage, (action.microbatch + 1) % program.num_microbatches)
        actions[position] = other
    else:
        actions[position] = Action(action.kind, (action.stage + 1) % program.num_stages, action.microbatch)
    return with_list(program, rank, actions)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_every_mutant_that_breaks_a_rule_is_refused(name):
    generator = random.Random(7)
    for _ in range(500):
        program = build(name, generator.choice((2, 3, 4)), generator.choice((2, 3, 5)))
        with pytest.raises(UsageError):
            check(mutants(program, generator))


def test_swapping_a_forward_behind_its_backward_is_refused():
    for name, p, m in (("gpipe", 3, 4), ("1f1b", 3, 4)):
        program = build(name, p, m)
        for rank in range(p):
            actions = list(program.actions[rank])
            i, j = actions.index(Action(Kind.F, rank, 1)), actions.index(Action(Kind.B, rank, 1))
            actions[i], actions[j] = actions[j], actions[i]
            with pytest.raises(UsageError):
                check(with_list(program, rank, actions))
