"""Parts of a state find whoever wants them, between any two grids."""

from dataclasses import replace

import numpy as np
import pytest

from hpcpipe.config.check import check_data, resolve
from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig
from hpcpipe.errors import RankError
from hpcpipe.recovery.transfer import Entry, Parts, plan_moves
from hpcpipe.schedule.build import build
from hpcpipe.train.parts import entries_of_grid, parts_of, targets_of, wanted_by
from hpcpipe.train.state import build_state


def config_of(pipeline: int, data: int, tied: bool) -> Config:
    config = Config(
        model=ModelConfig(layers=5, width=16, heads=2, context=8, tied=tied),
        parallel=ParallelConfig(pipeline=pipeline, data=data, microbatches=4),
    )
    config = replace(config, train=replace(config.train, precision="f32"))
    return check_data(resolve(config, pipeline * data), 11)


def states_of(config: Config):
    """The states of all ranks of a grid."""
    parallel = config.parallel
    schedule = build("1f1b", parallel.pipeline, parallel.microbatches // parallel.data)
    states = {}
    for role in range(parallel.pipeline * parallel.data):
        replica, stage_rank = divmod(role, parallel.pipeline)
        states[role] = build_state(config, schedule.stage_to_rank, stage_rank, replica)
    return schedule, states


def fill(states) -> None:
    """Give every element of every tensor a value of its own, the same on all ranks that have it."""
    for state in states.values():
        state.fill_initial()
        for stage in state.stages.values():
            for held in stage.stored_slices():
                tensor = held.tensor.tied_to or held.name
                for number, arena in enumerate(stage.moments.values()):
                    seed = sum(map(ord, tensor)) * 10 + number
                    whole = np.random.default_rng(seed).standard_normal(held.tensor.size, np.float32)
                    arena.arrays[held.name][...] = whole[held.start : held.stop]


GRIDS = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (1, 4)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("after", GRIDS)
@pytest.mark.parametrize("before", GRIDS)
def test_any_grid_gets_its_state_from_any_other(before, after, tied):
    old, new = config_of(*before, tied), config_of(*after, tied)
    schedule, sources = states_of(old)
    fill(sources)
    _, expected = states_of(new)
    fill(expected)
    _, found = states_of(new)
    entries, sizes = entries_of_grid(old, schedule)
    for role, state in sources.items():
        assert sizes[role] == [part.size for part in parts_of(state)]
    wanted = {role: wanted_by(state.stages, role // new.parallel.pipeline) for role, state in found.items()}
    targets = {role: list(targets_of(state)) for role, state in found.items()}
    held = {role: Parts(parts_of(state)) for role, state in sources.items()}
    for move in plan_moves(entries, wanted):
        target = targets[move.rank][move.wanted][move.at : move.at + move.size]
        target[...] = held[move.role].view(move.offset, move.size)
    for role, state in found.items():
        for ours, theirs in zip(targets[role], targets_of(expected[role]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for part, right in zip(parts_of(state), parts_of(expected[role]), strict=True):
            assert part.size == 0 or np.count_nonzero(part) > 0
            np.testing.assert_array_equal(part, right)


def test_what_nobody_holds_is_named():
    held = {0: [Entry("a", "weight", 0, 5, 0)], 1: [Entry("a", "weight", 6, 9, 0)]}
    assert len(plan_moves(held, {0: [Entry("a", "weight", 2, 5, 0)]})) == 1
    with pytest.raises(RankError, match="elements 5 to 9 of weight a are held by no rank"):
        plan_moves(held, {0: [Entry("a", "weight", 2, 9, 0)]})


def test_a_want_over_several_parts_is_several_moves():
    held = {1: [Entry("a", "weight", 4, 8, 100)], 0: [Entry("a", "weight", 0, 4, 7)]}
    moves = plan_moves(held, {5: [Entry("a", "weight", 3, 6, 0)]})
    assert [(move.role, move.offset, move.size, move.rank, move.at) for move in moves] == [
        (0, 10, 1, 5, 0),
        (1, 100, 2, 5, 1),
    ]
