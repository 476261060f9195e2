"""The order of samples: a permutation, another one in every epoch, the same for any batch."""

import numpy as np
import pytest

from hpcpipe.data.order import permuted, sample_at, sample_index

LARGE = 10**12 + 39


def test_every_size_from_1_to_300_is_permuted():
    for size in range(1, 301):
        image = permuted(7, 2, np.arange(size), size)
        assert image.dtype == np.uint64
        assert sorted(image.tolist()) == list(range(size)), f"size {size}"


@pytest.mark.parametrize("size", [65535, 65536, 65537, 99991])
def test_larger_sizes_are_permuted(size):
    assert np.array_equal(np.sort(permuted(0, 0, np.arange(size), size)), np.arange(size, dtype=np.uint64))


def test_a_large_range_needs_no_memory_and_has_no_collisions():
    index = np.concatenate([np.arange(50_000), LARGE - 1 - np.arange(50_000), np.arange(0, LARGE, LARGE // 50_000)])
    index = np.unique(index)
    image = permuted(3, 1, index, LARGE)
    assert int(image.max()) < LARGE
    assert len(np.unique(image)) == len(index)
    # Neighbours are torn apart: the mean distance of two random points is a third of the range.
    distance = np.abs(np.diff(image[:50_000].astype(np.float64))).mean()
    assert 0.32 < distance / LARGE < 0.35


@pytest.mark.parametrize("size", [2**62, 2**62 - 1, 2**61 + 1])
def test_the_largest_sizes_do_not_overflow(size):
    index = np.array([0, 1, size // 2, size - 2, size - 1], dtype=np.uint64)
    image = permuted(1, 0, index, size)
    assert all(0 <= value < size for value in image.tolist())
    assert len(set(image.tolist())) == len(index)


def test_every_position_is_equally_likely():
    size, num_keys = 7, 2100
    counts = np.zeros((size, size))
    for seed in range(num_keys):
        counts[np.arange(size), permuted(seed, 0, np.arange(size), size)] += 1
    expected = num_keys / size
    # 49 cells with 36 degrees of freedom; the 0.999999 quantile of chi-square is 93.
    assert ((counts - expected) ** 2 / expected).sum() < 93


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {tuple(permuted(seed, epoch, np.arange(100), 100).tolist()) for seed in (0, 1, -1) for epoch in range(10)}
    assert len(orders) == 30


def test_the_order_does_not_change_between_versions():
    # A run that is resumed by a later version must read what it would have read.
    assert permuted(1, 0, np.arange(10), 10).tolist() == [2, 9, 3, 4, 7, 1, 8, 0, 6, 5]
    assert sample_index(1234, np.array([0, 1, 10**12, 10**15]), 999_999_937).tolist() == [
        84398003,
        634159170,
        874979341,
        984418132,
    ]


def test_shapes_are_kept():
    assert permuted(0, 0, np.arange(12).reshape(3, 4), 12).shape == (3, 4)
    assert permuted(0, 0, 5, 12).shape == ()
    assert permuted(0, 0, [], 12).shape == (0,)


@pytest.mark.parametrize(("index", "size"), [([5], 5), ([-1], 5), ([0], 0), ([0], 2**62 + 1)])
def test_indices_out_of_range_are_refused(index, size):
    with pytest.raises(ValueError, match=r"range|size"):
        permuted(0, 0, index, size)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 37, 4099, 999_999_937, 2**62])
def test_one_position_has_the_sample_that_it_has_among_many(num_samples):
    positions = np.random.default_rng(num_samples).integers(0, 2**63, 50)
    positions[:20] = np.arange(20)
    positions[20:30] = num_samples - 1 + np.arange(10) % num_samples
    expected = sample_index(6, positions, num_samples).tolist()
    assert [sample_at(6, position, num_samples) for position in positions.tolist()] == expected


@pytest.mark.parametrize(("position", "num_samples"), [(-1, 5), (0, 0), (0, 2**62 + 1)])
def test_one_position_out_of_range_is_refused(position, num_samples):
    with pytest.raises(ValueError, match=r"num_samples|position"):
        sample_at(0, position, num_samples)


@pytest.mark.parametrize("num_samples", [1, 2, 37])
def test_every_epoch_reads_each_sample_once(num_samples):
    samples = sample_index(5, np.arange(4 * num_samples), num_samples).reshape(4, num_samples)
    assert (np.sort(samples, axis=1) == np.arange(num_samples)).all()
    if num_samples > 2:
        assert len({tuple(epoch) for epoch in samples.tolist()}) == 4


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_the_order_does_not_depend_on_how_positions_are_divided(num_ranks):
    whole = sample_index(11, np.arange(210), 41)
    divided = np.empty_like(whole)
    for rank in range(num_ranks):
        divided[rank::num_ranks] = sample_index(11, np.arange(rank, 210, num_ranks), 41)
    assert np.array_equal(whole, divided)


def test_wrong_positions_are_refused():
    with pytest.raises(ValueError, match="negative"):
        sample_index(0, [3, -1], 10)
    with pytest.raises(ValueError, match="at least 1"):
        sample_index(0, [0], 0)
