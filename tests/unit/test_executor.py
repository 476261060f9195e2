"""The executor's part in the end of a step: when a stage is reduced and updated, and what moves meanwhile."""

import time

import numpy as np
import pytest

from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.transport import NoTransport
from hpcpipe.schedule.build import build, build_forward
from hpcpipe.train.batches import empty_microbatch
from hpcpipe.train.gradients import Gradients
from hpcpipe.train.state import build_state


class Recorded:
    """A rank of a pipeline of one that notes what it calls."""

    def __init__(self, schedule):
        model = ModelConfig(layers=2, width=12, heads=3, context=6, vocab=11)
        state = build_state(Config(model=model, parallel=ParallelConfig(pipeline=1)), schedule.stage_to_rank, 0)
        gradients = Gradients(state, 1, schedule.num_microbatches)
        microbatch = empty_microbatch(1, 6)
        self.calls = []
        work = Work(
            load=lambda index: microbatch,
            gradients=gradients.of_layers,
            finished=lambda stage, index, *_: self.calls.append(f"added {stage}.{index}"),
            reduce=lambda stage: self.calls.append(f"reduce {stage}"),
            step=self.step,
            poll=lambda: self.calls.append("poll"),
        )
        self.executor = Executor(schedule, 0, state.compute_stages(1), NoTransport(), work)
        self.run_s = []

    def step(self, stage):
        self.calls.append(f"step {stage}")
        self.run_s.append(self.executor.run_s)
        time.sleep(0.05)

    def notes(self):
        return [call for call in self.calls if call != "poll"]


def test_a_stage_is_reduced_while_the_rank_goes_on_and_updated_at_the_end():
    recorded = Recorded(build("looped-bfs", 1, 2))
    for _ in range(2):
        recorded.calls.clear()
        recorded.executor.run()
        assert recorded.notes() == [
            *("added 1.0", "added 1.1", "reduce 1"),
            *("added 0.0", "added 0.1", "reduce 0"),
            *("step 0", "step 1"),
        ]
        after = recorded.calls[recorded.calls.index("reduce 1") : recorded.calls.index("reduce 0")]
        assert after.count("poll") >= 2


def test_the_time_of_the_schedule_ends_before_the_first_update():
    recorded = Recorded(build("1f1b", 1, 3))
    start = time.perf_counter()
    recorded.executor.run()
    assert time.perf_counter() - start >= recorded.executor.run_s + 0.05
    assert recorded.run_s == [recorded.executor.run_s] and recorded.executor.run_s > 0


def test_a_forward_only_schedule_updates_nothing_and_has_a_time():
    recorded = Recorded(build_forward((0,), 2))
    recorded.executor.run()
    assert recorded.notes() == ["added 0.0", "added 0.1"]
    assert recorded.executor.run_s > 0


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_the_second_step_does_not_see_the_gradients_of_the_first(schedule):
    program = build(schedule, 1, 4)
    state = build_state(Config(model=ModelConfig(layers=2, width=12, heads=3, context=6, vocab=11)), (0, 0), 0)
    if schedule == "1f1b":
        state = build_state(state.config, (0,), 0)
    state.fill_initial()
    gradients = Gradients(state, 2, 4)
    microbatch = empty_microbatch(1, 6)
    microbatch.coefficients.fill(1.0)
    microbatch.targets.fill(3)
    sums = []
    work = Work(
        load=lambda index: microbatch,
        gradients=gradients.of_layers,
        finished=lambda stage, index, *_: gradients.finished(stage, index),
        reduce=lambda stage: sums.append((stage, float(np.abs(gradients.close(stage).flat).sum()))),
    )
    executor = Executor(program, 0, state.compute_stages(1), NoTransport(), work)
    for _ in range(2):
        executor.run()
        gradients.reset()
    first, second = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    assert first == second
    assert sorted(stage for stage, _ in first) == list(state.stages)
    assert all(value > 0 for _, value in first)
