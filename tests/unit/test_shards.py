"""Shards: every element has one owner, cuts lie where blocks begin, and no replica has much more than another."""

import numpy as np
import pytest

from hpcpipe.config.schema import ModelConfig
from hpcpipe.kernels.reduce import BLOCK
from hpcpipe.memory.arena import Arena
from hpcpipe.model.embedding import TOKEN_TABLE
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.head import TABLE
from hpcpipe.model.tensors import TensorSpec
from hpcpipe.optim import shards
from hpcpipe.optim.shards import Bucket, cut_into_buckets


def cut(num_shards, width=48, vocab=300, layers=2, kept=slice(None)):
    model = ModelConfig(layers=layers, width=width, heads=3, context=64, vocab=vocab, tied=True)
    tensors = [tensor for layer in build_layers(model)[kept] for tensor in layer.tensors]
    arena = Arena({tensor.name: tensor.shape for tensor in tensors})
    return arena, tensors, cut_into_buckets(tensors, arena.offsets, (TOKEN_TABLE, TABLE), num_shards)


@pytest.mark.parametrize("width", [3, 48])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 7, 64])
def test_every_element_has_one_owner(num_shards, width):
    arena, tensors, buckets = cut(num_shards, width)
    for shard in range(num_shards):
        for bucket in buckets:
            for part in bucket.slices(shard):
                part.of(arena.arrays)[:] += 1
                assert part.start % BLOCK == 0
                assert part.stop % BLOCK == 0 or part.stop == part.tensor.size
                assert part.num_blocks == len(range(part.start, part.stop, BLOCK))
    assert all((arena.arrays[tensor.name] == 1).all() for tensor in tensors)
    assert arena.flat.sum() == sum(tensor.size for tensor in tensors)


@pytest.mark.parametrize("num_shards", [2, 3, 4, 7])
def test_shards_are_even_within_a_block(num_shards):
    for bucket in cut(num_shards)[2]:
        sizes = np.diff(bucket.cuts)
        assert sizes.sum() == bucket.size
        assert abs(sizes - bucket.size / num_shards).max() <= BLOCK + 16


def test_shards_are_where_their_slices_are():
    arena, _, buckets = cut(3)
    arena.flat[:] = np.arange(arena.flat.size)
    for bucket in buckets:
        run = bucket.of(arena.flat, arena.offsets)
        for shard in range(3):
            part = run[bucket.cuts[shard] : bucket.cuts[shard + 1]]
            for held in bucket.slices(shard):
                values = held.of(arena.arrays)
                assert part[0] <= values[0] and values[-1] <= part[-1]


@pytest.mark.parametrize("num_shards", [2, 3, 5])
def test_a_tied_table_is_cut_alike_at_both_ends_and_on_any_stage(num_shards):
    everything = cut(num_shards)[2]
    first, last = cut(num_shards, kept=slice(0, 2))[2], cut(num_shards, kept=slice(2, None))[2]
    tables = [everything[0], everything[-1], first[0], last[-1]]
    assert [table.tensors[0].name for table in tables] == [TOKEN_TABLE, TABLE] * 2
    assert {len(table.tensors) for table in tables} == {1}
    assert len({table.cuts for table in tables}) == 1
    assert len(set(tables[0].cuts)) == num_shards + 1


def test_buckets_are_bounded(monkeypatch):
    assert len(cut(2)[2]) == 3
    monkeypatch.setattr(shards, "LARGEST_BUCKET", 8000)
    _, tensors, buckets = cut(2)
    assert len(buckets) > 5
    assert [tensor for bucket in buckets for tensor in bucket.tensors] == tensors
    assert all(sum(tensor.size for tensor in bucket.tensors[:-1]) < 8000 for bucket in buckets)


def test_more_replicas_than_blocks_leave_some_with_nothing():
    bucket = cut(64, width=3)[2][0]
    assert bucket.size < BLOCK
    assert sum(bool(list(bucket.slices(shard))) for shard in range(64)) == 1


def test_cuts_are_the_nearest_ones_that_are_allowed():
    for num_shards in (2, 3, 7, 64):
        for bucket in cut(num_shards)[2]:
            places = zip(bucket.tensors, bucket.offsets, strict=True)
            allowed = [start for tensor, offset in places for start in range(offset, offset + tensor.size, BLOCK)]
            allowed.append(bucket.size)
            even = [bucket.size * shard // num_shards for shard in range(1, num_shards)]
            nearest = [min(allowed, key=lambda place, wanted=wanted: (abs(place - wanted), place)) for wanted in even]
            assert bucket.cuts == (0, *nearest, bucket.size)


def test_a_tensor_larger_than_any_memory_is_cut_at_once():
    bucket = Bucket((TensorSpec("x", (2**33, 2**35)),), (0,), 4)
    assert bucket.cuts == (0, 2**66, 2**67, 3 * 2**66, 2**68)
