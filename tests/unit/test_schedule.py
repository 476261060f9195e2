"""Schedules: golden traces, completeness, order, deadlock freedom, and a checker that refuses broken ones."""

import itertools
import random
from collections import Counter

import pytest

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import COMPUTE, UPDATE, Action, Kind, Schedule
from hpcpipe.schedule.buffers import count_buffers, peak_stash
from hpcpipe.schedule.build import GENERATORS, build, generate
from hpcpipe.schedule.check import check
from hpcpipe.schedule.lower import lower
from hpcpipe.schedule.simulate import Costs, simulate

RANKS = (1, 2, 3, 4, 5, 8)


def microbatch_counts(num_ranks):
    return sorted({1, 2, 3, num_ranks, 2 * num_ranks - 1, 2 * num_ranks, 2 * num_ranks + 1, 4 * num_ranks})


CASES = [(name, p) for name in GENERATORS for p in RANKS]

# Makespan at F = I = W = 1 of one microbatch through all layers of a rank, and the largest stash.
GOLDEN = {
    (2, 4): {
        ("gpipe", 1): (15, 4), ("1f1b", 1): (15, 2), ("interleaved", 2): (13.5, 2.5), ("interleaved", 4): (12.75, 2.25),
        ("zb-h1", 1): (13, 2), ("interleaved-zb", 2): (12.5, 2), ("zb-v", 2): (12.5, 2), ("dualpipe-v", 2): (12.5, 2.5),
    },
    (4, 8): {
        ("gpipe", 1): (33, 8), ("1f1b", 1): (33, 4), ("interleaved", 2): (28.5, 5.5), ("interleaved", 4): (26.25, 4.75),
        ("zb-h1", 1): (27, 4), ("interleaved-zb", 2): (25.5, 4), ("zb-v", 2): (25.5, 4), ("dualpipe-v", 2): (25.5, 4.5),
    },
    (4, 16): {
        ("gpipe", 1): (57, 16), ("1f1b", 1): (57, 4), ("interleaved", 2): (52.5, 5.5), ("interleaved", 4): (50.25, 4.75),
        ("zb-h1", 1): (51, 4), ("interleaved-zb", 2): (49.5, 4), ("zb-v", 2): (49.5, 4), ("dualpipe-v", 2): (49.5, 4.5),
    },
    (8, 16): {
        ("gpipe", 1): (69, 16), ("1f1b", 1): (69, 8), ("interleaved", 2): (58.5, 11.5), ("interleaved", 4): (53.25, 9.75),
        ("zb-h1", 1): (55, 8), ("interleaved-zb", 2): (51.5, 8), ("zb-v", 2): (51.5, 8), ("dualpipe-v", 2): (51.5, 8.5),
    },
    (8, 32): {
        ("gpipe", 1): (117, 32), ("1f1b", 1): (117, 8), ("interleaved", 2): (106.5, 11.5),
        ("interleaved", 4): (101.25, 9.75), ("zb-h1", 1): (103, 8), ("interleaved-zb", 2): (99.5, 8),
        ("zb-v", 2): (99.5, 8), ("dualpipe-v", 2): (99.5, 8.5),
    },
}  # fmt: skip

# ruff: noqa: E501
TRACES = """
1f1b 4 6 0 F0.0 F0.1 F0.2 F0.3 B0.0 F0.4 B0.1 F0.5 B0.2 B0.3 B0.4 B0.5
1f1b 4 6 3 F3.0 B3.0 F3.1 B3.1 F3.2 B3.2 F3.3 B3.3 F3.4 B3.4 F3.5 B3.5
gpipe 2 3 1 F1.0 F1.1 F1.2 B1.0 B1.1 B1.2
interleaved 2 4 0 F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3
interleaved 2 4 1 F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3
zb-h1 4 6 1 F1.0 F1.1 F1.2 I1.0 F1.3 I1.1 W1.0 F1.4 I1.2 W1.1 F1.5 I1.3 W1.2 I1.4 W1.3 I1.5 W1.4 W1.5
zb-h1 4 6 3 F3.0 I3.0 F3.1 I3.1 F3.2 I3.2 F3.3 I3.3 W3.0 F3.4 I3.4 W3.1 F3.5 I3.5 W3.2 W3.3 W3.4 W3.5
zb-v 2 4 0 F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 I3.1 W3.1 F0.3 I0.0 W0.0 F3.2 I3.2 W3.2 I0.1 W0.1 F3.3 I3.3 W3.3 I0.2 W0.2 I0.3 W0.3
zb-v 2 4 1 F1.0 F2.0 F1.1 F2.1 I2.0 W2.0 F1.2 I1.0 W1.0 F2.2 I2.1 W2.1 F1.3 I1.1 W1.1 F2.3 I2.2 W2.2 I1.2 I2.3 I1.3 W1.2 W2.3 W1.3
dualpipe-v 2 5 0 F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 F0.3 B3.1 F3.2 B0.0 F0.4 B3.2 F3.3 B0.1 B3.3 F3.4 B0.2 B3.4 I0.3 W0.3 I0.4 W0.4
dualpipe-v 2 5 1 F1.0 F2.0 F1.1 F2.1 F1.2 B2.0 F2.2 B1.0 F1.3 B2.1 F2.3 B1.1 F1.4 B2.2 F2.4 B1.2 B2.3 B1.3 I2.4 I1.4 W2.4 W1.4
"""


def compute(schedule, rank):
    return " ".join(str(action) for action in schedule.actions[rank] if action.kind in COMPUTE)


@pytest.mark.parametrize("trace", TRACES.strip().splitlines())
def test_golden_traces(trace):
    name, p, m, rank, *actions = trace.split()
    assert compute(generate(name, int(p), int(m)), int(rank)).split() == actions


def test_halves_of_the_first_stage_that_stand_together_become_whole():
    assert compute(build("zb-h1", 4, 3), 0) == "F0.0 F0.1 F0.2 B0.0 B0.1 B0.2"
    assert compute(build("zb-h1", 4, 2), 3) == compute(generate("zb-h1", 4, 2), 3)
    for name, p in CASES:
        m = 2 * p
        split, whole = generate(name, p, m), build(name, p, m)
        costs = Costs.uniform(split, 1, 1.3, 0.7, 0.1)
        assert simulate(whole, costs).makespan == pytest.approx(simulate(split, costs).makespan)
        assert peak_stash(whole) == peak_stash(split)
        own = [action for action in whole.actions[0] if action.kind in COMPUTE]
        assert not any(
            a == b._replace(kind=Kind.I) and b == (Kind.W, 0, a.microbatch) for a, b in itertools.pairwise(own)
        )


def test_a_repeated_half_is_not_hidden():
    split = generate("zb-h1", 2, 2)
    actions = " ".join(map(str, split.actions[0]))
    assert actions == "F0.0 F0.1 I0.0 W0.0 I0.1 W0.1"
    for extra in ("W0.0", "I0.0"):
        with pytest.raises(UsageError, match=r"stands twice|one B, or one I and one W"):
            check(lower(with_list(split, 0, [*split.actions[0], Action.parse(extra)])))


@pytest.mark.parametrize(("p", "m"), GOLDEN)
def test_golden_makespans_and_stashes(p, m):
    for (name, chunks), (makespan, stash) in GOLDEN[p, m].items():
        schedule = build(name, p, m, chunks)
        timeline = simulate(schedule, Costs.uniform(schedule))
        assert (timeline.makespan, max(timeline.peak_stash)) == (makespan, stash), name
        assert timeline.bubble == makespan - 3 * m


def test_golden_messages_in_flight():
    def in_flight(name, p, m):
        schedule = build(name, p, m)
        return simulate(schedule, Costs.uniform(schedule)).max_in_flight

    assert [in_flight(name, 4, 16) for name in ("1f1b", "zb-h1", "zb-v", "dualpipe-v", "eager-1f1b")] == [1, 1, 2, 2, 2]
    assert in_flight("interleaved", 4, 16) == 3
    assert (in_flight("looped-bfs", 4, 16), in_flight("looped-bfs", 8, 32)) == (12, 24)


def test_message_latency_is_exposed_where_there_is_no_slack():
    def bubble(name, chunks=0):
        schedule = build(name, 4, 16, chunks)
        return simulate(schedule, Costs.uniform(schedule, message=0.1)).bubble

    expected = {
        ("1f1b", 0): 11.8,
        ("eager-1f1b", 0): 9.6,
        ("zb-h1", 0): 4.2,
        ("interleaved", 4): 5.25,
        ("zb-v", 0): 2.8,
    }
    for (name, chunks), value in expected.items():
        assert bubble(name, chunks) == pytest.approx(value, abs=0.051), name


@pytest.mark.parametrize(("name", "efficiency"), [("1f1b", 0.739), ("zb-h1", 0.810)])
def test_a_last_stage_that_is_a_quarter_slower(name, efficiency):
    schedule = build(name, 4, 16)
    slow = [1.0, 1.0, 1.0, 1.25]
    timeline = simulate(schedule, Costs(slow, slow, slow))
    assert sum(timeline.busy) / 4 / timeline.makespan == pytest.approx(efficiency, abs=0.0005)


def test_lowering_posts_receives_before_the_previous_send():
    text = " ".join(str(action) for action in build("1f1b", 2, 3).actions[0])
    assert text == (
        "F0.0 SEND_F0.0 RECV_B0.0 F0.1 SEND_F0.1 B0.0 RECV_B0.1 F0.2 SEND_F0.2 RECV_B0.2 B0.1 B0.2 REDUCE0 STEP0"
    )


@pytest.mark.parametrize(("name", "p"), CASES)
def test_every_generator_is_proven_for_any_number_of_microbatches(name, p):
    for m in microbatch_counts(p):
        try:
            program = build(name, p, m)
        except UsageError as error:
            assert "set parallel.microbatches" in str(error)
            continue
        assert program.num_ranks == p and program.num_microbatches == m


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["looped-bfs", "interleaved", "interleaved-zb"])
def test_any_number_of_chunks(name, chunks):
    for p in (1, 2, 3, 4):
        assert build(name, p, 2 * p, chunks).num_stages == p * chunks


def test_refusals_name_what_would_do():
    with pytest.raises(UsageError, match=r"set parallel.microbatches = 4 or 6"):
        build("interleaved", 2, 5)
    with pytest.raises(UsageError, match=r"set parallel.microbatches = 8"):
        build("dualpipe-v", 4, 7)
    with pytest.raises(UsageError, match=r"zb-v has 2 stages per rank, not 3"):
        build("zb-v", 2, 4, 3)


@pytest.mark.parametrize("p", [*range(1, 13), 21])
def test_half_and_a_third_of_the_memory(p):
    """The bubbles are half and about two thirds of 1F1B's, 3(p - 1), where all ranks have something to do."""
    for m in microbatch_counts(p):
        for name, stash, bubble in (("v-half", (p + 2) // 2, 1.5 * (p - 1)), ("v-min", (p + 4) // 3, 2 * p - 1.5)):
            schedule = build(name, p, m)
            timeline = simulate(schedule, Costs.uniform(schedule))
            assert max(timeline.peak_stash) <= stash
            assert m < max(4, p) or timeline.bubble <= max(bubble, 0), (name, m)


def test_the_bubble_of_v_half_and_v_min():
    for p, m, v_half, v_min in ((4, 8, 4.5, 5.5), (8, 32, 10.5, 13.5), (5, 20, 5.5, 7.5)):
        for name, bubble in (("v-half", v_half), ("v-min", v_min)):
            schedule = build(name, p, m)
            assert simulate(schedule, Costs.uniform(schedule)).bubble == bubble


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
        action = Action(kind, stage, 0 if kind in UPDATE else k)
        assert Action.parse(str(action)) == action
    assert str(Action(Kind.STEP, 2, 0)) == "STEP2"
    for text in ("", "F", "F1", "X0.0", "F-1.0", "F0.0.0", "F 0.0", "STEP", "STEP1.0", "REDUCE0.3"):
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


def delayed_receives(actions):
    """Post every receive right before the action that needs it."""
    later = [action for action in actions if action.kind not in (Kind.RECV_F, Kind.RECV_B)]
    for action in actions:
        if action.kind in (Kind.RECV_F, Kind.RECV_B):
            kinds = (Kind.F,) if action.kind is Kind.RECV_F else (Kind.B, Kind.I)
            needed_by = {Action(kind, action.stage, action.microbatch) for kind in kinds}
            later.insert(next(index for index, other in enumerate(later) if other in needed_by), action)
    return later


def test_blocking_sends_would_deadlock_without_receives_posted_ahead():
    for name in ("1f1b", "zb-h1", "interleaved", "zb-v", "dualpipe-v"):
        program = build(name, 2, 4)
        lists = tuple(tuple(delayed_receives(actions)) for actions in program.actions)
        with pytest.raises(UsageError, match="deadlock"):
            check(Schedule(name, 4, program.stage_to_rank, lists))


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


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "dualpipe-v"])
def test_every_mutant_that_breaks_a_rule_is_refused(name):
    generator = random.Random(7)
    for _ in range(200):
        program = build(name, generator.choice((2, 3, 4)), generator.choice((2, 3)))
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


@pytest.mark.parametrize("name", GENERATORS)
def test_every_stage_is_reduced_and_updated_once(name):
    schedule = build(name, 4, 8)
    for rank, actions in enumerate(schedule.actions):
        held = [] if schedule.is_forward_only else schedule.stages_of(rank)
        updates = [action for action in actions if action.kind in UPDATE]
        assert actions[len(actions) - len(held) :] == tuple(Action(Kind.STEP, stage, 0) for stage in held)
        assert Counter(updates) == Counter(Action(kind, stage, 0) for kind in UPDATE for stage in held)
        for stage in held:
            last = max(at for at, (kind, s, _) in enumerate(actions) if kind in (Kind.B, Kind.W) and s == stage)
            after = actions[last + 1 : actions.index(Action(Kind.REDUCE, stage, 0))]
            assert after in ((), (Action(Kind.SEND_B, stage, 7),))
