"""What survivors decide: the newest step that everybody's state is held of, and who takes which place."""

import random

import pytest

from hpcpipe.errors import ExitCode
from hpcpipe.recovery.copies import kept_by, neighbour_of
from hpcpipe.recovery.decide import Decision, Holder, Source, assign, decide
from hpcpipe.recovery.standing import Standing


def never(num_processes):
    raise AssertionError("there are enough processes")


def working(role, live=10, own=(9, 10), held=(9, 10), *, pipeline=4, data=1, near=False, **more):
    """A rank that keeps its own and its neighbour's copies, or, if `near`, reaches those of all ranks."""
    kept = set(range(pipeline * data)) - {role} if near else {kept_by(role, pipeline, data)}
    steps = tuple(held if one in kept else (-1, -1) for one in range(pipeline * data))
    return Standing(100 + role, role, True, live, own, steps, **more)


def spare(number, *, is_ready=True):
    return Standing(number, is_ready=is_ready)


def test_rows_read_back():
    one = working(3, finished=1, failed=71, rewind=7)
    assert Standing.from_row(one.to_row(4)) == one
    assert one.to_row(4).size == spare(9).to_row(4).size
    assert Standing.from_row(spare(9).to_row(4)).held == ((-1, -1),) * 4


def test_a_spare_takes_the_place_and_the_neighbour_has_the_state():
    survivors = [working(0), working(1), working(3), spare(4), spare(5)]
    decision = decide(survivors, 4, 1, never)
    assert decision.roles == (0, 1, 3, 2, -1)
    assert decision.step == 10
    assert decision.holders == {
        0: Holder(0, Source.LIVE),
        1: Holder(1, Source.LIVE),
        2: Holder(0, Source.HELD),
        3: Holder(2, Source.LIVE),
    }


def test_all_go_back_to_the_newest_step_that_is_held_of_everybody():
    survivors = [working(0, live=11, own=(10, 11), held=(10, -1)), working(1, live=-1), working(3), spare(4)]
    decision = decide(survivors, 4, 1, never)
    assert decision.step == 10
    assert decision.holders is not None
    assert decision.holders[0] == Holder(0, Source.OWN)
    assert decision.holders[1] == Holder(1, Source.OWN)
    assert decision.holders[3] == Holder(2, Source.LIVE)


def test_a_rank_that_dies_with_its_neighbour_is_on_the_disk():
    assert neighbour_of(1, 4, 1) == 3
    decision = decide([working(0), working(2), spare(4), spare(5)], 4, 1, never)
    assert (decision.step, decision.holders) == (-1, {})
    assert sorted(decision.roles) == [0, 1, 2, 3]


def test_on_one_machine_any_rank_that_is_left_has_the_state_of_all():
    decision = decide([working(2, near=True), *map(spare, (4, 5, 6))], 4, 1, never)
    assert decision.step == 10
    assert decision.holders == {role: Holder(0, Source.LIVE if role == 2 else Source.HELD) for role in range(4)}


def test_what_is_not_filled_yet_is_on_the_disk():
    survivors = [working(0), Standing(101, 1), working(3), spare(4, is_ready=False)]
    assert decide(survivors, 4, 1, never).step == -1


def test_spares_that_are_left_alone_start_from_the_disk():
    decision = decide([spare(4), spare(5)], 2, 1, never)
    assert (decision.exit_code, decision.roles, decision.step) == (None, (0, 1), -1)


def test_a_replica_goes_and_its_other_ranks_become_spares():
    # Roles of 2 x 2: replica 0 has 0 and 1, replica 1 has 2 and 3.
    survivors = [working(role, pipeline=2, data=2) for role in (0, 2, 3)]
    decision = decide(survivors, 2, 2, lambda num: (2, 1) if num == 3 else None)
    assert (decision.pipeline, decision.data) == (2, 1)
    assert decision.roles == (0, -1, 1)
    assert decision.step == 10


def test_a_shorter_pipeline_keeps_the_order():
    decision = decide([working(0), working(2), working(3)], 4, 1, lambda num: (3, 1))
    assert decision.roles == (0, 1, 2)


def test_the_first_rank_stays_the_first():
    # After a replacement the process with role 0 is the last one.
    survivors = [working(2, pipeline=2, data=2), working(3, pipeline=2, data=2), working(0, pipeline=2, data=2)]
    assert decide(survivors, 2, 2, lambda num: (2, 1)).roles == (-1, 1, 0)


def test_too_few_are_left():
    decision = decide([working(0)], 4, 1, lambda num: None)
    assert decision.exit_code == ExitCode.STOPPED
    assert "1 processes are left for 4 ranks" in decision.reason


def test_an_error_of_one_rank_ends_the_run_for_all():
    survivors = [working(0), working(1, failed=65), working(3), spare(4)]
    assert decide(survivors, 4, 1, never) == Decision(65, 1)


def test_a_run_that_was_over_stays_so():
    survivors = [working(0, finished=1), working(1, finished=1), spare(4)]
    assert decide(survivors, 4, 1, never) == Decision(0, 0)
    assert decide([working(0, finished=1), working(1), spare(4), spare(5)], 4, 1, never).exit_code is None


def test_levels():
    survivors = [working(0), working(1), working(2), working(3)]
    assert decide(survivors, 4, 1, never, lambda reached: 0).step == 10
    assert decide(survivors, 4, 1, never, lambda reached: 1).step == -1
    assert decide(survivors, 4, 1, never, lambda reached: 2).exit_code == ExitCode.STOPPED


def test_going_back_takes_what_is_on_the_disk():
    survivors = [working(role, rewind=7) for role in range(4)]
    decision = decide(survivors, 4, 1, never)
    assert (decision.step, decision.at_most) == (-1, 7)


@pytest.mark.parametrize(("pipeline", "data"), [(1, 2), (2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (2, 4), (5, 3)])
def test_every_rank_has_one_keeper_that_is_not_itself(pipeline, data):
    roles = range(pipeline * data)
    assert sorted(neighbour_of(role, pipeline, data) for role in roles) == list(roles)
    assert all(kept_by(neighbour_of(role, pipeline, data), pipeline, data) == role for role in roles)
    assert all(neighbour_of(role, pipeline, data) != role for role in roles)


@pytest.mark.parametrize("seed", range(200))
def test_whoever_dies_every_role_is_filled_once(seed):
    rng = random.Random(seed)
    pipeline, data, num_spares = rng.randint(1, 5), rng.randint(1, 3), rng.randint(0, 3)
    num_roles = pipeline * data
    everyone = [working(role, pipeline=pipeline, data=data) for role in range(num_roles)]
    everyone += [spare(200 + number) for number in range(num_spares)]
    rng.shuffle(everyone)
    survivors = everyone[: rng.randint(num_roles, len(everyone))]
    decision = decide(survivors, pipeline, data, never)
    filled = [role for role in decision.roles if role >= 0]
    assert sorted(filled) == list(range(num_roles))
    for one, role in zip(survivors, decision.roles, strict=True):
        assert one.is_spare or role == one.role
    after = rng.randint(1, pipeline), rng.randint(1, data)
    roles = assign(survivors, (pipeline, data), after)
    assert sorted(role for role in roles if role >= 0) == list(range(after[0] * after[1]))
