"""What ranks allocate to train is what was predicted, to the byte."""

import gc
from collections import Counter

import pytest
from support.small_training import Training

from hpcpipe.memory.block import allocated_bytes
from hpcpipe.train.footprint import predict_memory

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [("1f1b", "none"), ("1f1b", "selective"), ("zb-h1", "full"), ("interleaved", "none"), ("zb-v", "selective")],
)
def test_every_rank_allocates_what_was_predicted(comm, schedule, recompute):
    layers = 2 * comm.size
    data = 2 if comm.size % 2 == 0 else 1
    for pipeline in {comm.size, comm.size // data}:
        gc.collect()
        before = Counter(allocated_bytes())
        training = Training(
            comm,
            pipeline,
            comm.size // pipeline,
            microbatches=2 * comm.size,
            schedule=schedule,
            layers=layers,
            recompute=recompute,
        )
        allocated = Counter(allocated_bytes()) - before
        predicted = predict_memory(training.config, training.schedule, training.grid.stage_rank, training.grid.replica)
        assert allocated == predicted
        assert allocated["sums"] > 0
        training.run(1)
        assert Counter(allocated_bytes()) - before == predicted
        training.close()
