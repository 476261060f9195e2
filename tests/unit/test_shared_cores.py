"""Ranks that share cores: a fair system, simulated."""

import numpy as np
import pytest

from hpcpipe.schedule.build import GENERATORS, build
from hpcpipe.schedule.simulate import Costs, simulate

NAMES = [name for name in GENERATORS if name != "forward"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_one_core_does_everything_one_after_the_other(name, num_ranks):
    schedule = build(name, num_ranks, 2 * num_ranks)
    timeline = simulate(schedule, Costs.uniform(schedule), cores=1)
    assert timeline.makespan == pytest.approx(3 * num_ranks * 2 * num_ranks)


@pytest.mark.parametrize("name", NAMES)
def test_almost_enough_cores_take_almost_as_long_as_enough(name):
    schedule = build(name, 4, 8)
    generator = np.random.default_rng(1)
    costs = Costs(*(generator.uniform(0, 2, schedule.num_stages).tolist() for _ in range(3)), message=0.1)
    whole, shared = (simulate(schedule, costs, cores) for cores in (4, 4 - 1e-9))
    assert shared.makespan == pytest.approx(whole.makespan, rel=1e-6)
    for ours, theirs in zip(shared.ends, whole.ends, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_two_ranks_on_one_core_take_turns():
    schedule = build("1f1b", 2, 1)
    timeline = simulate(schedule, Costs.uniform(schedule, 1, 1, 1, message=0.5), cores=1)
    assert timeline.starts == ((0.0, 5.0), (1.5, 2.5))
    assert timeline.makespan == pytest.approx(7.0)


def test_ranks_that_compute_at_one_time_slow_each_other_down():
    schedule = build("gpipe", 2, 2)
    timeline = simulate(schedule, Costs.uniform(schedule), cores=1.5)
    # The second forward of rank 0 and the first of rank 1 run side by side at three quarters of the speed.
    assert timeline.ends[0][1] == pytest.approx(1 + 1 / 0.75)
    assert timeline.ends[1][0] == pytest.approx(1 + 1 / 0.75)
