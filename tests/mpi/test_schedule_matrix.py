"""Every schedule, on every pipeline, with few and many microbatches: the bits of one process after 20 steps.

The cells and what they leave out are in ``support/schedule_cells.py``; docs/numerics.md shows them as a table.
"""

import functools
import hashlib
import pickle
import re

import pytest
from mpi4py import MPI
from support.hard_messages import fewer_steps
from support.schedule_cells import VARIANTS, always_run, layers_of, legal_counts, microbatch_counts, refusal
from support.small_training import CLIP, all_weights, owned_weights, train

from hpcpipe.errors import UsageError
from hpcpipe.mpi.collectives import broadcast_bytes
from hpcpipe.mpi.wait import Waiter

pytestmark = pytest.mark.mpi(min_size=2)

STEPS = fewer_steps(20)
BFLOAT16_MICROBATCHES = 8


def digest(content):
    return hashlib.sha256(content).hexdigest()


def train_alone(pipeline, microbatches, precision):
    """Return losses and norms of a single process with gpipe, and its weights' digests."""
    choices = {"microbatches": microbatches, "lanes": 1, "schedule": "gpipe", "layers": layers_of(pipeline)}
    choices["precision"] = precision
    results, state = train(MPI.COMM_SELF, 1, 1, STEPS, **choices)
    return results, {name: digest(content) for name, content in owned_weights(state).items()}


@functools.cache
def references(pipeline, precision="f32"):
    """Return what a single process gets for each number of microbatches; each rank computes some, and all get all."""
    counts, comm = microbatch_counts(pipeline), MPI.COMM_WORLD
    if precision == "bf16":
        counts = [BFLOAT16_MICROBATCHES]
    mine = {m: train_alone(pipeline, m, precision) for index, m in enumerate(counts) if index % comm.size == comm.rank}
    found = {}
    for index, m in enumerate(counts):
        content = pickle.dumps(mine[m]) if m in mine else None
        found[m] = pickle.loads(broadcast_bytes(comm, Waiter(60.0), content, index % comm.size))
    return found


def assert_same_bits(comm, variant, microbatches, precision="f32"):
    choices = {"microbatches": microbatches, "lanes": 1, "schedule": variant.name, "chunks": variant.chunks}
    choices["precision"] = precision
    results, state = train(comm, comm.size, 1, STEPS, layers=layers_of(comm.size), recompute="full", **choices)
    expected, digests = references(comm.size, precision)[microbatches]
    assert results == expected, (variant, comm.size, microbatches)
    weights = all_weights(state)
    different = [name for name, content in weights if digest(content) != digests[name]]
    assert weights and not different, (variant, comm.size, microbatches)


def test_every_step_of_the_reference_is_clipped_and_its_bits_depend_on_the_microbatches(comm):
    found = references(comm.size)
    for results, _ in found.values():
        assert min(norm for _, norm in results) > CLIP
        assert len(set(results)) == STEPS
    assert len({results[0] for results, _ in found.values()}) == len(found)


def test_the_comparison_can_fail_and_clipping_changes_the_bits(comm):
    expected, digests = references(comm.size)[comm.size]
    choices = {"microbatches": comm.size, "schedule": "1f1b", "layers": layers_of(comm.size), "lanes": 1}
    results, state = train(comm, comm.size, 1, STEPS, clip=1e9, **choices)
    assert results[0] == expected[0] and results[-1] != expected[-1]
    assert all(digest(content) != digests[name] for name, content in all_weights(state))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_same_bits(comm, variant):
    for microbatches in always_run(variant, comm.size):
        assert_same_bits(comm, variant, microbatches)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_same_bits_with_bfloat16_operands(comm, variant):
    if refusal(variant, comm.size, BFLOAT16_MICROBATCHES) is not None:
        pytest.skip(f"not defined for {BFLOAT16_MICROBATCHES} microbatches on {comm.size} ranks")
    assert_same_bits(comm, variant, BFLOAT16_MICROBATCHES, "bf16")


def test_precisions_have_bits_of_their_own(comm):
    expected = references(comm.size)
    for microbatches, (results, _) in references(comm.size, "bf16").items():
        if microbatches in expected:
            assert results != expected[microbatches][0]
        assert len(set(results)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_same_bits_in_the_rest_of_the_matrix(comm, variant):
    for microbatches in legal_counts(variant, comm.size):
        if microbatches not in always_run(variant, comm.size):
            assert_same_bits(comm, variant, microbatches)


def test_same_bits_in_a_pipeline_of_one(comm):
    if comm.size > 2:
        pytest.skip("a pipeline of one is the same on any number of ranks")
    cells = [(variant, m) for variant in VARIANTS for m in legal_counts(variant, 1)]
    references(1)
    for variant, microbatches in cells[comm.rank :: comm.size]:
        assert_same_bits(MPI.COMM_SELF, variant, microbatches)


def test_what_is_not_defined_is_refused_on_every_rank_before_anything_starts(comm):
    refused = 0
    for variant in VARIANTS:
        for microbatches in microbatch_counts(comm.size):
            reason = refusal(variant, comm.size, microbatches)
            if reason is None:
                continue
            refused += 1
            choices = {"microbatches": microbatches, "schedule": variant.name, "chunks": variant.chunks}
            with pytest.raises(UsageError, match=re.escape(reason)):
                train(comm, comm.size, 1, STEPS, layers=layers_of(comm.size), **choices)
    assert refused > 0
