"""The memory of a rank, predicted before anything is allocated."""

import tracemalloc

import numpy as np
import pytest

from hpcpipe.config.check import check_stages, resolve
from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from hpcpipe.errors import UsageError
from hpcpipe.mpi.shards import receive_elements
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.transport import NoTransport
from hpcpipe.schedule.build import build_forward
from hpcpipe.train.footprint import predict_bytes, require_memory
from hpcpipe.train.gradients import Gradients
from hpcpipe.train.session import build_schedule
from hpcpipe.train.state import build_state


def configured(schedule="1f1b", recompute="none", microbatches=4, data=1, lanes=0):
    config = Config(
        model=ModelConfig(layers=4, width=64, heads=2, context=64, vocab=300),
        parallel=ParallelConfig(
            schedule=schedule, microbatches=microbatches, microbatch_size=4, data=data, lanes=lanes
        ),
        train=TrainConfig(recompute=recompute),
    )
    config = resolve(config, 2 * data)
    program = build_schedule(config)
    return check_stages(config, program.num_stages), program


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "zb-v"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("data", [1, 4])
def test_the_prediction_is_what_is_allocated(schedule, recompute, rank, data):
    config, program = configured(schedule, recompute, 4 * data, data)
    tracemalloc.start()
    state = build_state(config, program.stage_to_rank, rank, data - 1)
    gradients = Gradients(state, config.parallel.lanes // data, program.num_microbatches)
    largest = max(max(np.diff(bucket.cuts)) for stage in state.stages.values() for bucket in stage.buckets)
    received = np.empty(receive_elements(data, largest), np.float32)
    work = Work(load=lambda index: None, gradients=gradients.of_layers, finished=lambda *_: None)
    stages = state.compute_stages(4, recompute == "full")
    executor = Executor(program, rank, stages, NoTransport(), work)
    forward = build_forward(program.stage_to_rank, 3)
    evaluator = Executor(forward, rank, state.compute_stages(4), NoTransport(), work)
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del executor, evaluator, received
    assert predict_bytes(config, program, rank) == pytest.approx(allocated, rel=0.15)


@pytest.mark.parametrize("data", [2, 4, 8])
def test_replicas_share_the_moments(data):
    predicted, stages = [], []
    for replicas in (1, data):
        config, program = configured(microbatches=64, data=replicas, lanes=replicas)
        predicted.append(predict_bytes(config, program, 0))
        stages.append(build_state(config, program.stage_to_rank, 0).stages[0])
    whole, shard = (sum(arena.flat.size for arena in stage.moments.values()) for stage in stages)
    assert shard == pytest.approx(whole / data, rel=0.1)
    largest = max(max(np.diff(bucket.cuts)) for bucket in stages[1].buckets)
    # The head's use of the token table arrives from the other rank, whole or one shard of it.
    table, part = (max(np.diff(stage.buckets[0].cuts)) for stage in stages)
    expected = whole + table - shard - part - receive_elements(data, largest)
    assert predicted[0] - predicted[1] == pytest.approx(4 * expected, rel=0.03)


def test_what_does_not_fit_is_refused_with_numbers_and_cure():
    require_memory(2**30, 2, 2**31)
    with pytest.raises(UsageError, match=r"1\.0 GiB per rank, 3\.0 GiB for the 3 ranks .* 2\.0 GiB are free: use more"):
        require_memory(2**30, 3, 2**31)
