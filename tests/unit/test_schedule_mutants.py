"""More than 10,000 broken schedules are refused, and no sound one is.

Whether a mutant is sound is decided here, without the checker: its actions must be the right ones, on the right ranks,
and the graph of everything that must come before something else must have no cycle.
"""

import random
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Action, Kind, Schedule
from hpcpipe.schedule.build import GENERATORS, build
from hpcpipe.schedule.check import check

SHAPES = [(2, 4, 0), (3, 6, 0), (4, 8, 0)]
MORE_CHUNKS = {"looped-bfs": 3, "interleaved": 3, "interleaved-zb": 4}
BROKEN_PER_GENERATOR = max(800, -(-10_500 // len(GENERATORS)))

F, B, I, W = Kind.F, Kind.B, Kind.I, Kind.W  # noqa: E741


def programs(name):
    shapes = [*SHAPES, (2, 4, MORE_CHUNKS[name])] if name in MORE_CHUNKS else SHAPES
    return [build(name, *shape) for shape in shapes]


def is_sound(mutant, original):
    """Whether a mutant has the actions of the schedule that it came from, in an order that all ranks can follow.

    Which backwards are whole and which are halves is no matter of order, so the actions must be those of the original.
    """
    for actions, right in zip(mutant.actions, original.actions, strict=True):
        if Counter(actions) != Counter(right):
            return False
    last = mutant.num_stages - 1
    everything = {action for actions in mutant.actions for action in actions}
    before = TopologicalSorter()
    for actions in mutant.actions:
        for first, second in pairwise(actions):
            before.add(second, first)
    for action in everything:
        kind, s, k = action
        needs = {
            F: [Action(Kind.RECV_F, s, k), Action(Kind.SEND_F, s - 1, k), Action(F, s - 1, k)],
            W: [Action(I, s, k), *(Action(kind, s, j) for kind in (B, W) for j in range(k))],
            Kind.SEND_F: [Action(F, s, k), Action(Kind.RECV_F, s + 1, k)],
            Kind.SEND_B: [Action(B, s, k), Action(I, s, k), Action(Kind.RECV_B, s - 1, k)],
            Kind.RECV_F: [],
            Kind.RECV_B: [],
            Kind.REDUCE: [Action(kind, s, j) for kind in (B, W) for j in range(mutant.num_microbatches)],
            Kind.STEP: [action for action in mutant.actions[mutant.stage_to_rank[s]] if action.kind is not Kind.STEP],
        }
        of_gradient = [
            Action(Kind.RECV_B, s, k),
            Action(Kind.SEND_B, s + 1, k),
            Action(B, s + 1, k),
            Action(I, s + 1, k),
        ]
        needs[I] = [Action(F, s, k), *(of_gradient if s < last else [])]
        needs[B] = [*needs[I], *needs[W][1:]]
        before.add(action, *everything.intersection(needs[kind]))
    try:
        before.prepare()
    except CycleError:
        return False
    return True


def with_lists(program, lists):
    return Schedule(program.name, program.num_microbatches, program.stage_to_rank, tuple(map(tuple, lists)))


def drop(program, lists, rank, at, dice):
    del lists[rank][at]


def repeat(program, lists, rank, at, dice):
    lists[rank].insert(dice.randrange(len(lists[rank]) + 1), lists[rank][at])


def other_rank(program, lists, rank, at, dice):
    target = lists[dice.choice([other for other in range(len(lists)) if other != rank])]
    target.insert(dice.randrange(len(target) + 1), lists[rank].pop(at))


def other_microbatch(program, lists, rank, at, dice):
    kind, stage, k = lists[rank][at]
    lists[rank][at] = Action(kind, stage, dice.choice([j for j in range(-1, program.num_microbatches + 1) if j != k]))


def other_stage(program, lists, rank, at, dice):
    kind, stage, k = lists[rank][at]
    lists[rank][at] = Action(kind, dice.choice([s for s in range(-1, program.num_stages + 1) if s != stage]), k)


def other_kind(program, lists, rank, at, dice):
    kind, stage, k = lists[rank][at]
    lists[rank][at] = Action(dice.choice([other for other in Kind if other is not kind]), stage, k)


def exchange_ranks(program, lists, rank, at, dice):
    other = dice.choice([other for other in range(len(lists)) if other != rank])
    there = dice.randrange(len(lists[other]))
    lists[rank][at], lists[other][there] = lists[other][there], lists[rank][at]


def swap(program, lists, rank, at, dice):
    there = dice.randrange(len(lists[rank]))
    lists[rank][at], lists[rank][there] = lists[rank][there], lists[rank][at]


def shift(program, lists, rank, at, dice):
    action = lists[rank].pop(at)
    lists[rank].insert(dice.randrange(len(lists[rank]) + 1), action)


def swap_neighbours(program, lists, rank, at, dice):
    at = min(at, len(lists[rank]) - 2)
    lists[rank][at : at + 2] = reversed(lists[rank][at : at + 2])


CHANGES_OF_ACTIONS = (drop, repeat, other_rank, other_microbatch, other_stage, other_kind, exchange_ranks)
CHANGES_OF_ORDER = (swap, shift, swap_neighbours)


def mutate(program, change, dice):
    lists = [list(actions) for actions in program.actions]
    rank = dice.randrange(len(lists))
    change(program, lists, rank, dice.randrange(len(lists[rank])), dice)
    return with_lists(program, lists)


def difference(mutant, original):
    """Say what a mutant changed, for the message of a failure."""
    pairs = enumerate(zip(mutant.actions, original.actions, strict=True))
    return [
        f"rank {rank}: {' '.join(map(str, new))}\n  instead of: {' '.join(map(str, old))}"
        for rank, (new, old) in pairs
        if new != old
    ]


@pytest.mark.parametrize("name", GENERATORS)
def test_every_broken_mutant_is_refused_and_no_sound_one_is(name):
    dice = random.Random(f"{name} 20")
    originals = programs(name)
    for original in originals:
        assert is_sound(original, original)
        check(original)
    broken: Counter = Counter()
    sound = 0
    while broken.total() < BROKEN_PER_GENERATOR:
        original = dice.choice(originals)
        change = dice.choice((*CHANGES_OF_ACTIONS, *CHANGES_OF_ORDER))
        mutant = mutate(original, change, dice)
        if change in CHANGES_OF_ORDER and is_sound(mutant, original):
            check(mutant)
            sound += 1
            continue
        broken[change.__name__] += 1
        try:
            check(mutant)
        except UsageError:
            continue
        pytest.fail(f"{change.__name__} was not seen:\n" + "\n".join(difference(mutant, original)))
    assert len(broken) == len(CHANGES_OF_ACTIONS) + len(CHANGES_OF_ORDER)
    assert min(broken.values()) >= 10
    assert sound >= 30


def test_there_are_more_than_10_000():
    assert BROKEN_PER_GENERATOR * len(GENERATORS) > 10_000


@pytest.mark.parametrize("name", GENERATORS)
def test_another_placement_or_number_of_microbatches_is_refused(name):
    for program in programs(name):
        for stage, rank in enumerate(program.stage_to_rank):
            placement = list(program.stage_to_rank)
            for holder in (rank - 1, rank + 1, (rank + 1) % program.num_ranks):
                placement[stage] = holder
                mutant = Schedule(name, program.num_microbatches, tuple(placement), program.actions)
                with pytest.raises(UsageError):
                    check(mutant)
        for m in (program.num_microbatches - 1, program.num_microbatches + 1):
            with pytest.raises(UsageError):
                check(Schedule(name, m, program.stage_to_rank, program.actions))


def test_the_judge_of_mutants_can_tell():
    program = build("1f1b", 2, 2)
    assert [str(action) for action in program.actions[1]] == [
        *("RECV_F1.0", "RECV_F1.1", "F1.0", "B1.0", "SEND_B1.0", "F1.1", "B1.1", "SEND_B1.1", "REDUCE1", "STEP1")
    ]

    def judged(*order):
        actions = tuple(program.actions[1][at] for at in order)
        return is_sound(with_lists(program, [program.actions[0], actions]), program)

    assert judged(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert judged(1, 0, 2, 3, 4, 5, 6, 7, 8, 9), "receives may be posted in another order"
    assert judged(0, 1, 2, 5, 3, 4, 6, 7, 8, 9), "the second forward may come before the first backward"
    assert not judged(0, 1, 3, 2, 4, 5, 6, 7, 8, 9), "a backward before its forward"
    assert not judged(0, 2, 3, 4, 5, 1, 6, 7, 8, 9), "a receive after the forward that needs it"
    assert not judged(0, 1, 2, 5, 6, 7, 3, 4, 8, 9), "weight gradients that descend"
    assert judged(0, 1, 2, 3, 4, 5, 6, 8, 7, 9), "a reduction before the last message"
    assert not judged(0, 1, 2, 3, 4, 5, 8, 6, 7, 9), "a reduction before the last weight gradient"
    assert not judged(0, 1, 2, 3, 4, 5, 6, 8, 9, 7), "an update while another rank waits for a message"
    assert not judged(0, 1, 2, 3, 4, 5, 6, 7, 9, 8), "an update before the reduction"

    words = (
        "F0.0 SEND_F0.0 F0.1 SEND_F0.1 RECV_B0.0 B0.0 RECV_B0.1 B0.1 REDUCE0 STEP0",
        "RECV_F1.0 F1.0 B1.0 SEND_B1.0 RECV_F1.1 F1.1 B1.1 SEND_B1.1 REDUCE1 STEP1",
    )
    lists = [[Action.parse(word) for word in line.split()] for line in words]
    assert not is_sound(with_lists(program, lists), program), "two sends that wait for each other's receives"
    lists[0].insert(3, lists[0].pop(4))
    assert is_sound(with_lists(program, lists), program), "the receive posted before the send"


def stash_of(program, rank):
    """Count a rank's stashes after each action, one action after the other."""
    live, counts = 0, []
    for action in program.actions[rank]:
        live += (action.kind is F) - (action.kind in (B, W))
        counts.append(live)
    return counts


def in_flight_of(program):
    """Count each rank's messages in flight on a clock of turns, turn after turn, without the simulator."""
    lists = [[action for action in actions if action.kind in (F, B, I, W)] for actions in program.actions]
    ends, at, clock = {}, [0] * len(lists), [0] * len(lists)
    taken = {}
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(lists):
            while at[rank] < len(actions):
                kind, s, k = actions[at[rank]]
                source = ("F", s - 1, k) if kind is F else ("B", s + 1, k)
                if kind is W or not 0 <= source[1] < program.num_stages:
                    ready = 0
                elif source in ends:
                    ready = ends[source]
                else:
                    break
                start = max(clock[rank], ready)
                if kind is not W and 0 <= source[1] < program.num_stages:
                    taken[source] = start
                clock[rank] = start + (2 if kind is B else 1)
                if kind is not W:
                    ends["F" if kind is F else "B", s, k] = clock[rank]
                at[rank] += 1
                progress = True
    placement = program.stage_to_rank
    peaks = [0] * len(lists)
    for rank in range(len(lists)):
        spans = [
            (ends[made], start)
            for made, start in taken.items()
            if placement[made[1]] == rank and placement[made[1] + (1 if made[0] == "F" else -1)] != rank
        ]
        peaks[rank] = max((sum(a <= time < b for a, b in spans) for time, _ in spans), default=0)
    return peaks


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "forward"])
def test_limits_are_kept_or_refused(name):
    """Sound mutants have other peaks; each passes with its own as the limit and is refused with anything less."""
    dice = random.Random(f"{name} limits")
    for original in programs(name):
        chunks = original.num_stages // original.num_ranks
        found = 0
        while found < 10:
            mutant = mutate(original, dice.choice(CHANGES_OF_ORDER), dice)
            if not is_sound(mutant, original):
                continue
            found += 1
            peaks = [max(stash_of(mutant, rank)) for rank in range(mutant.num_ranks)]
            flights = in_flight_of(mutant)
            limits = [peak / chunks for peak in peaks]
            check(mutant, limits, max(flights))
            rank = dice.randrange(mutant.num_ranks)
            over = stash_of(mutant, rank).index(peaks[rank])
            limits[rank] = (peaks[rank] - 0.5) / chunks
            rule = rf"rank {rank}, position {over}, F\S+: the stash grows to {peaks[rank] / chunks:g} activations"
            with pytest.raises(UsageError, match=rule):
                check(mutant, limits)
            if max(flights) > 0:
                first = flights.index(max(flights))
                with pytest.raises(UsageError, match=rf"rank {first}, position \d+, SEND_\S+: too many messages"):
                    check(mutant, None, max(flights) - 1)


def test_the_judge_of_limits_can_tell():
    program = build("looped-bfs", 4, 16)
    assert max(in_flight_of(program)) == 12 and max(stash_of(program, 0)) == 32
    assert in_flight_of(build("1f1b", 3, 4)) == [1, 1, 0]
    assert [max(stash_of(build("1f1b", 3, 4), rank)) for rank in range(3)] == [3, 2, 1]
