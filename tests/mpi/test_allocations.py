"""A step allocates nothing: no data of any array, on any rank.

Every block of array data that numpy allocates in steps 3 to 6 is counted, whatever its size and however short its
life. Views, numbers and other Python objects are not, nor what MPI keeps for itself.
`tests/unit/test_allocations.py` counts what kernels allocate, and reading samples.
"""

import pytest
from support.allocations import counted_allocations
from support.small_training import Training

from hpcpipe.kernels.threads import Team

pytestmark = pytest.mark.mpi(min_size=2)


class NoSamples:
    """Tokens that cost nothing."""

    def batch(self, first, count, tokens, targets):
        tokens.fill(first % 11)
        targets.fill((first + 1) % 11)


def grids(comm, pipelines):
    """Every rank alone, and all together with pipelines of some lengths."""
    alone = comm.Split(color=comm.rank)
    yield alone, 1
    alone.Free()
    for pipeline in pipelines:
        yield comm, pipeline


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
def test_steps_allocate_nothing(comm, schedule, recompute, precision, threads):
    team = Team(threads)
    for some, pipeline in grids(comm, (1, comm.size)):
        training = Training(
            some,
            pipeline,
            some.size // pipeline,
            microbatches=2 * some.size,
            schedule=schedule,
            layers=2 * some.size + 1,
            recompute=recompute,
            precision=precision,
            threads=threads,
            team=team,
            samples=NoSamples(),
        )
        training.run(2)
        with counted_allocations() as found:
            results = training.run(4)
        assert found == []
        assert len({result.loss for result in results}) == 4
        training.close()
    team.close()
