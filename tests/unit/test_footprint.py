"""The memory of a rank, predicted before anything is allocated."""

import tracemalloc

import pytest

from hpcpipe.config.check import check_stages, resolve
from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from hpcpipe.errors import UsageError
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.transport import NoTransport
from hpcpipe.schedule.build import build_forward
from hpcpipe.train.footprint import predict_bytes, require_memory
from hpcpipe.train.gradients import Gradients
from hpcpipe.train.session import build_schedule
from hpcpipe.train.state import build_state


def configured(schedule="1f1b", recompute="none", microbatches=4):
    config = Config(
        model=ModelConfig(layers=4, width=64, heads=2, context=64, vocab=300),
        parallel=ParallelConfig(schedule=schedule, microbatches=microbatches, microbatch_size=4),
        train=TrainConfig(recompute=recompute),
    )
    config = resolve(config, 2)
    program = build_schedule(config)
    return check_stages(config, program.num_stages), program


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "zb-v"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_prediction_is_what_is_allocated(schedule, recompute, rank):
    config, program = configured(schedule, recompute)
    tracemalloc.start()
    state = build_state(config, program.stage_to_rank, rank)
    gradients = Gradients(state, config.parallel.lanes, program.num_microbatches)
    work = Work(load=lambda index: None, gradients=gradients.of_layers, finished=lambda *_: None)
    stages = state.compute_stages(4, recompute == "full")
    executor = Executor(program, rank, stages, NoTransport(), work)
    forward = build_forward(program.stage_to_rank, 3)
    evaluator = Executor(forward, rank, state.compute_stages(4), NoTransport(), work)
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del executor, evaluator
    assert predict_bytes(config, program, rank) == pytest.approx(allocated, rel=0.15)


def test_what_does_not_fit_is_refused_with_numbers_and_cure():
    require_memory(2**30, 2, 2**31)
    with pytest.raises(UsageError, match=r"1\.0 GiB per rank, 3\.0 GiB for the 3 ranks .* 2\.0 GiB are free: use more"):
        require_memory(2**30, 3, 2**31)
