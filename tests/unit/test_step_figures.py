"""The figures of a step: what is waited, what explains it, and where the time goes."""

import numpy as np
import pytest

from hpcpipe.bench.config import RandomSamples
from hpcpipe.bench.step_figures import Machine, RankFigures, kernel_rows, step_figures, waiting_figures
from hpcpipe.schedule.action import COMPUTE
from hpcpipe.schedule.build import build
from hpcpipe.schedule.simulate import Costs, simulate
from hpcpipe.schedule.waiting import waiting_without_messages

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v")


def durations_of(schedule, costs):
    """Return what each compute action takes, rank by rank."""
    table = costs.by_kind()
    return [
        [table[action.kind][action.stage] for action in actions if action.kind in COMPUTE]
        for actions in schedule.actions
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_waiting_without_messages_is_that_of_the_simulation(name):
    schedule = build(name, 4, 8)
    generator = np.random.default_rng(5)
    costs = Costs(*generator.uniform(0.5, 2.0, (3, schedule.num_stages)).tolist())
    timeline = simulate(schedule, costs)
    idle = [ends[-1] - busy for ends, busy in zip(timeline.ends, timeline.busy, strict=True)]
    np.testing.assert_allclose(waiting_without_messages(schedule, durations_of(schedule, costs)), idle)


def test_an_action_that_takes_longer_keeps_the_others_waiting():
    schedule = build("gpipe", 2, 1)
    # F0, B0 on the first rank; F1, B1 on the second.
    assert waiting_without_messages(schedule, [[1.0, 2.0], [3.0, 5.0]]) == [8.0, 1.0]


def figures(waited_s, actions_s, step_s=10.0, kernels=None, steps=3):
    own = RankFigures(kernels=kernels or {})
    for _ in range(steps):
        own.add(step_s, waited_s + 0.5, waited_s, actions_s)
    return own


def test_what_the_replay_does_not_explain_is_exposed_message_time():
    schedule = build("gpipe", 2, 1)
    ranks = [figures(8.3, [1.0, 2.0], step_s=20.0), figures(1.1, [3.0, 5.0], step_s=20.0)]
    found = waiting_figures(schedule, ranks, 1)
    assert found == pytest.approx({"waiting": 4.7 / 20, "scheduled_waiting": 4.5 / 20, "exposed_messages": 0.2 / 20})
    # A second replica without waiting halves the excess; what ranks did not wait is no exposed time below zero.
    other = [figures(8.0, [1.0, 2.0], step_s=20.0), figures(1.0, [3.0, 5.0], step_s=20.0)]
    assert waiting_figures(schedule, [*ranks, *other], 2)["exposed_messages"] == pytest.approx(0.1 / 20)
    early = [figures(7.0, [1.0, 2.0]), figures(1.0, [3.0, 5.0])]
    assert waiting_figures(schedule, early, 1)["exposed_messages"] == 0


def test_the_time_of_a_step_is_shared_out_over_kernels_waiting_and_the_rest():
    machine = Machine(num_ranks=2, peak_flops=400.0, copy_bytes_per_s=80.0)
    ranks = [
        figures(2.0, [1.0], kernels={"linear": (6, 12.0, 600.0, 30.0), "add_into": (3, 1.5, 0.0, 60.0)}),
        figures(1.0, [1.0], kernels={"linear": (3, 9.0, 300.0, 15.0), "unknown": (3, 3.0, 0.0, 0.0)}),
    ]
    found = kernel_rows(ranks, machine)
    linear, unknown, add_into = found["kernels"]
    assert (linear["name"], linear["calls"], linear["seconds"], linear["share"]) == ("linear", 3, 7.0, 0.35)
    assert (linear["flops"], linear["bytes"], linear["flops_per_s"]) == (300.0, 15.0, pytest.approx(300 / 7))
    # A rank has half of the peak and of the bandwidth.
    assert (linear["peak_s"], linear["copy_s"]) == (1.5, 0.375)
    assert (add_into["flops_per_s"], add_into["peak_s"], add_into["copy_s"]) == (None, None, 0.5)
    assert (unknown["bytes_per_s"], unknown["copy_s"]) == (None, None)
    assert (found["observed_step_s"], found["waiting_s"]) == (20.0, 4.0)
    assert found["other_s"] == pytest.approx(20 - 4 - 7 - 1 - 0.5)


def test_figures_of_steps_are_those_of_the_median():
    found = step_figures([1.0, 4.0, 2.0], [0.1, 0.5, 0.2], 100, 300.0, Machine(2, 600.0, 1.0))
    assert (found["tokens_per_s"], found["step_s"], found["mfu"], found["bubble"]) == (50.0, 2.0, 0.25, 0.2)
    assert 1 <= found["step_p10_s"] < 2 < found["step_p90_s"] <= 4


def test_random_samples_are_of_the_vocabulary_and_a_function_of_their_number():
    samples = RandomSamples(7)
    tokens, targets = np.zeros((2, 3, 50), np.int32), np.zeros((2, 3, 50), np.int32)
    samples.batch(4, 3, tokens[0], targets[0])
    samples.batch(5, 3, tokens[1], targets[1])
    assert set(tokens.reshape(-1)) == set(range(7))
    assert np.array_equal(tokens[0, 1:], tokens[1, :-1])
    assert np.array_equal(tokens[0, :, 1:], targets[0, :, :-1])
