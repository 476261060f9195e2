"""Samples and held-out windows against plain slices of the tokens."""

import gzip
import lzma
from itertools import pairwise

import numpy as np
import pytest

from hpcpipe.data.compression import baseline
from hpcpipe.data.order import sample_index
from hpcpipe.data.prepare import prepare
from hpcpipe.data.reader import TokenFile, TokenRange
from hpcpipe.data.windows import HeldOut, Samples
from hpcpipe.errors import UsageError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"text number {number}, " * (number + 1))
    prepare([str(folder)], folder / "tokens.h5")
    with TokenFile(folder / "tokens.h5") as opened:
        yield opened


def part(file, start, length):
    """A range of the file that need not begin with a document."""
    return TokenRange(file, start, start + length, 1)


def samples_of(samples, first, count, context):
    tokens, targets = np.full((2, count, context), -7, dtype=np.int32)
    samples.batch(first, count, tokens, targets)
    return tokens, targets


@pytest.mark.parametrize("context", [1, 2, 7, 64])
@pytest.mark.parametrize("extra", [1, 2, 5])
def test_samples_are_the_windows_in_the_order_of_the_seed(file, context, extra):
    tokens = file.read(100, 100 + 6 * context + extra).astype(np.int32)
    samples = Samples(part(file, 100, len(tokens)), context, seed=9)
    assert samples.num_samples == (len(tokens) - 1) // context
    count = 2 * samples.num_samples + 1
    got_tokens, got_targets = samples_of(samples, 3, count, context)
    for row, window in enumerate(sample_index(9, np.arange(3, 3 + count), samples.num_samples).tolist()):
        start = window * context
        assert np.array_equal(got_tokens[row], tokens[start : start + context])
        assert np.array_equal(got_targets[row], tokens[start + 1 : start + context + 1])


def test_an_epoch_predicts_every_token_at_most_once(file):
    context = 16
    samples = Samples(part(file, 0, file.num_tokens), context, seed=0)
    _, targets = samples_of(samples, 0, samples.num_samples, context)
    predicted = file.read(1, 1 + samples.num_samples * context)
    assert np.array_equal(np.bincount(targets.ravel(), minlength=257), np.bincount(predicted, minlength=257))
    assert file.num_tokens - 1 - predicted.size < context


def test_batches_may_be_cut_anywhere(file):
    samples = Samples(part(file, 0, file.num_tokens), 10, seed=4)
    whole = samples_of(samples, 0, 61, 10)
    pieces = [samples_of(samples, first, count, 10) for first, count in [(0, 1), (1, 40), (41, 0), (41, 20)]]
    for which in (0, 1):
        assert np.array_equal(whole[which], np.concatenate([piece[which] for piece in pieces]))


def test_positions_far_into_a_run(file):
    samples = Samples(part(file, 0, file.num_tokens), 10, seed=4)
    assert (samples_of(samples, 10**15, 3, 10)[0] >= 0).all()


@pytest.mark.parametrize("length", [1, 16])
def test_too_few_tokens_for_one_sample_are_refused_with_numbers(file, length):
    with pytest.raises(UsageError, match=rf"tokens\.h5: {length} training tokens .* context 16 needs 17"):
        Samples(part(file, 0, length), 16, seed=0)
    assert Samples(part(file, 0, 17), 16, seed=0).num_samples == 1


def held_out_of(held_out, context, batch_size):
    """All predicted tokens, with the token before each, in batches of a size."""
    pairs = []
    for first in range(0, held_out.num_samples, batch_size):
        tokens = np.full((batch_size, context), -7, dtype=np.int32)
        targets = np.full((batch_size, context), -7, dtype=np.int32)
        coefficients = np.full((batch_size, context), 9, dtype=np.float32)
        held_out.batch(first, batch_size, tokens, targets, coefficients)
        real = coefficients == 1.0
        assert (coefficients[~real] == 0.0).all()
        assert (targets[~real] == -1).all()
        assert (tokens[~real] == 256).all()
        pairs += zip(tokens[real].tolist(), targets[real].tolist(), strict=True)
    return pairs


@pytest.mark.parametrize("context", [1, 3, 16, 1000])
@pytest.mark.parametrize("length", [2, 3, 49, 50, 51, 200])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_held_out_token_but_the_first_is_predicted_once(file, context, length, batch_size):
    held_out = HeldOut(part(file, 0, length), context, limit=0)
    tokens = file.read(0, length)
    assert held_out_of(held_out, context, batch_size) == list(pairwise(tokens))
    assert held_out.num_predictions == length - 1
    assert held_out.num_samples == -(-(length - 1) // context)
    assert held_out.num_bytes == int((tokens[1:] < 256).sum())
    assert held_out.raw_bytes() == bytes(int(token) for token in tokens[1:] if token < 256)


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
def test_a_limit_takes_the_first_samples(file, limit):
    held_out = HeldOut(part(file, 0, 100), 16, limit)
    assert held_out.num_samples == min(limit, 7)
    assert held_out.num_predictions == min(limit * 16, 99)
    assert len(held_out_of(held_out, 16, 2)) == held_out.num_predictions
    assert len(held_out.raw_bytes()) == held_out.num_bytes <= held_out.num_predictions


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_held_out_is_nothing_to_predict(file, length):
    held_out = HeldOut(part(file, 0, length), 16, 0)
    assert (held_out.num_samples, held_out.num_predictions, held_out.num_bytes) == (0, 0, 0)
    assert held_out.raw_bytes() == b""


def test_buffers_of_another_shape_or_type_are_refused(file):
    samples = Samples(part(file, 0, 200), 8, 0)
    held_out = HeldOut(part(file, 0, 200), 8, 0)
    good = np.zeros((2, 8), dtype=np.int32)
    with pytest.raises(ValueError, match=r"targets_out must be int32\[2, 8\], not int64\[2, 8\]"):
        samples.batch(0, 2, good, good.astype(np.int64))
    with pytest.raises(ValueError, match=r"tokens_out must be int32\[3, 8\]"):
        samples.batch(0, 3, good, good)
    with pytest.raises(ValueError, match="coefficients_out must be float32"):
        held_out.batch(0, 2, good, good, good.astype(np.float64))


def test_compressors():
    raw = b"the same words again and again, " * 100
    assert baseline(raw) == {
        "gzip": 8 * len(gzip.compress(raw, 9)) / len(raw),
        "xz": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
    assert baseline(b"") == {"gzip": 0.0, "xz": 0.0}
    noise = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8).tobytes()
    assert all(bits > 8 for bits in baseline(noise).values())
