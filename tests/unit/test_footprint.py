"""The memory of a rank, predicted before anything is allocated."""

import gc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from support.snapshots import allocate_copies, allocate_snapshot

from hpcpipe.config.check import check_stages, resolve
from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from hpcpipe.errors import UsageError
from hpcpipe.memory.block import allocated_bytes
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.partition import partition
from hpcpipe.mpi.shards import receive_elements
from hpcpipe.pipeline.buffers import RankLayout, StageShape
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.transport import NoTransport
from hpcpipe.schedule.build import GENERATORS, build, build_forward
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.footprint import predict_bytes, predict_largest_bytes, predict_memory, require_memory
from hpcpipe.train.gradients import Gradients
from hpcpipe.train.save import SNAPSHOT
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


def allocate(config, program, rank, replica):
    """Make what a rank computes on, but for what needs other ranks: sums over replicas and over the pipeline."""
    state = build_state(config, program.stage_to_rank, rank, replica)
    gradients = Gradients(state, config.parallel.lanes // config.parallel.data, program.num_microbatches)
    local = range(program.num_microbatches)
    batches = TrainingBatches(None, config.parallel.microbatches, local, 4, config.model.context)
    work = Work(load=batches.__getitem__, gradients=gradients.of_layers, finished=lambda *_: None)
    stages = state.compute_stages(4, config.train.recompute)
    executor = Executor(program, rank, stages, NoTransport(), work)
    forward = build_forward(program.stage_to_rank, 5)
    evaluator = Executor(forward, rank, state.compute_stages(4), NoTransport(), work, executor.memory)
    copies = allocate_copies(config, state)
    return executor, evaluator, allocate_snapshot(state), copies


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v", "v-half", "dualpipe-v"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("data", [1, 4])
def test_the_prediction_is_what_is_allocated(schedule, recompute, rank, data):
    config, program = configured(schedule, recompute, 4 * data, data)
    gc.collect()
    before = Counter(allocated_bytes())
    held = allocate(config, program, rank, data - 1)
    allocated = Counter(allocated_bytes()) - before
    predicted = predict_memory(config, program, rank, data - 1)
    assert predicted.pop("sums") > 0
    assert allocated == predicted
    assert set(allocated) == {"weights", "moments", "gradients", "activations", "batches", "snapshot", "copies"}
    del held


def test_no_copies_take_no_memory():
    config, program = configured("1f1b", "none", 4)
    config = replace(config, recovery=replace(config.recovery, copy_every=0))
    assert "copies" not in predict_memory(config, program, 0)


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "forward"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 1), (2, 4), (4, 3), (4, 8)])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_an_evaluation_fits_where_training_computes(name, ranks, microbatches, recompute):
    """Both have one block, so the number of held-out samples does not count."""
    try:
        program = build(name, ranks, microbatches)
    except UsageError as error:
        pytest.skip(str(error))
    layers = build_layers(ModelConfig(layers=2 * program.num_stages - 1, width=12, heads=3, context=6, vocab=11))
    ranges = partition(layers, program.num_stages)
    for rank in range(ranks):
        held = {stage: layers[ranges[stage].start : ranges[stage].stop] for stage in program.stages_of(rank)}
        training = {stage: StageShape(held[stage], 2, (12, 12), recompute) for stage in held}
        evaluating = {stage: StageShape(held[stage], 2, (12, 12)) for stage in held}
        _, needed = RankLayout(program, rank, training).place()
        for count in (1, 2, 9):
            _, extent = RankLayout(build_forward(program.stage_to_rank, count), rank, evaluating).place()
            assert extent.plain <= needed.plain and extent.padded <= needed.padded


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "forward"])
def test_stages_of_a_rank_share_memory(name):
    """What is planned from lifetimes is hardly more than what lives at once."""
    program = build(name, 4, 12)
    layers = build_layers(ModelConfig(layers=2 * program.num_stages - 1, width=24, heads=3, context=16, vocab=111))
    ranges = partition(layers, program.num_stages)
    for rank in range(4):
        shapes = {
            stage: StageShape(layers[ranges[stage].start : ranges[stage].stop], 2, (32, 24))
            for stage in program.stages_of(rank)
        }
        layout = RankLayout(program, rank, shapes)
        assert layout.least_bytes() <= sum(layout.place()[1]) <= 1.1 * layout.least_bytes()


@pytest.mark.parametrize("data", [1, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_the_largest_prediction_is_that_of_some_rank(schedule, data):
    config, program = configured(schedule, microbatches=4 * data, data=data)
    every = [predict_bytes(config, program, rank, replica) for rank in range(2) for replica in range(data)]
    assert predict_largest_bytes(config, program) == max(every) > min(every)


@pytest.mark.parametrize("data", [2, 4, 8])
def test_replicas_share_the_moments(data):
    predicted, stages = [], []
    for replicas in (1, data):
        config, program = configured(microbatches=64, data=replicas, lanes=replicas)
        # A replica's share of the microbatches is a matter of its own, and so are copies of what it updates.
        apart = Counter(dict.fromkeys(("batches", "copies", SNAPSHOT), 1 << 40))
        shared = Counter(predict_memory(config, program, 0)) - apart
        predicted.append(shared.total())
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
