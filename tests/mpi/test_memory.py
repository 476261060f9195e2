"""What ranks allocate to train is what was predicted, to the byte."""

import gc
from collections import Counter

import pytest
from support.small_training import Training
from support.snapshots import allocate_copies, allocate_snapshot

from hpcpipe.kernels.threads import Team
from hpcpipe.memory.block import allocated_bytes
from hpcpipe.train.footprint import predict_memory

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize(
    ("schedule", "recompute", "precision", "threads"),
    [
        ("1f1b", "none", "f32", 1),
        ("1f1b", "selective", "f32", 1),
        ("zb-h1", "full", "f32", 1),
        ("interleaved", "none", "bf16", 2),
        ("zb-v", "selective", "bf16", 1),
        ("1f1b", "full", "bf16", 2),
    ],
)
def test_every_rank_allocates_what_was_predicted(comm, schedule, recompute, precision, threads):
    layers, team = 2 * comm.size, Team(threads)
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
            precision=precision,
            threads=threads,
            team=team,
        )
        snapshot = allocate_snapshot(training.state)
        copies = allocate_copies(training.config, training.state)
        allocated = Counter(allocated_bytes()) - before
        predicted = predict_memory(training.config, training.schedule, training.grid.stage_rank, training.grid.replica)
        assert allocated == predicted
        assert allocated["sums"] > 0
        training.run(1)
        assert Counter(allocated_bytes()) - before == predicted
        assert snapshot.nbytes == predicted["snapshot"]
        del snapshot, copies
        training.close()
    team.close()
