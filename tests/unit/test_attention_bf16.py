"""Attention on bfloat16 operands: within the errors that it states of float64, and the same bits however it is cut."""

import inspect
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tile_emulator
from support.fresh import RANDOM

from hpcpipe.kernels import features, reference, reference_bf16
from hpcpipe.kernels.attention_bf16 import attention_backward_bf16, attention_forward_bf16, attention_scratch_bf16
from hpcpipe.kernels.reference_products import rounded, widened

NORMAL = 2.0**-126
"""The smallest float32 and bfloat16 number that may not count as zero."""
NAN = 0x7FC0
# (T, D, heads, batch)
SHAPES = [
    *((1, 8, 2, 3), (1, 1, 1, 1), (31, 24, 1, 1), (32, 32, 2, 1), (32, 80, 1, 3), (33, 64, 2, 3), (70, 24, 3, 1)),
    *((70, 33, 1, 2), (96, 64, 2, 2), (130, 80, 1, 3), (130, 8, 3, 1), (128, 96, 1, 1)),
]
KINDS = ["random", "one-hot", "equal", "subnormal", "zero", "mixed"]


def aligned(num_elements, margin=0):
    """uint16 from the start of a cache line; the margin behind it holds NaN, and nobody may write it."""
    raw = np.full(num_elements + margin + 32, NAN, np.uint16)
    start = -raw.ctypes.data % 64 // 2
    return raw[start : start + num_elements + margin]


def bits(*shape):
    """What must be overwritten."""
    return aligned(int(np.prod(shape))).reshape(shape)


def inputs(kind, context, size, heads, batch):
    """Return qkv and dout."""
    rows, width = batch * context, heads * size
    q, k, v, dout = RANDOM.standard_normal((4, rows, width))
    if kind == "one-hot":
        q, k = 30 * q, 30 * k
    elif kind == "equal":
        q, k, v, dout = (np.repeat(x[:1], rows, axis=0) for x in (q, k, v, dout))
    elif kind == "subnormal":
        q, v, dout = 1e-39 * q, 1e-39 * v, 1e-39 * dout
    elif kind == "zero":
        q, k, v, dout = (np.zeros_like(x) for x in (q, k, v, dout))
    elif kind == "mixed":
        q, k, v, dout = (x * 2.0 ** RANDOM.integers(-9, 3, (rows, 1)) for x in (q, k, v, dout))
    qkv = bits(rows, 3 * width)
    qkv[:] = rounded(np.concatenate([q, k, v], axis=1))
    gradient = bits(rows, width)
    gradient[:] = rounded(dout)
    return qkv, gradient


def attend(qkv, heads, batch, cuts=None):
    """Return out and lse."""
    rows, width = len(qkv), qkv.shape[1] // 3
    out, lse = bits(rows, width), np.full((batch, heads, rows // batch), np.nan, np.float32)
    for first, last in cuts or [(0, batch * heads)]:
        needed = attention_scratch_bf16(rows // batch, width, heads)
        scratch = aligned(needed, margin=64)
        attention_forward_bf16(qkv, batch, heads, out, lse, scratch[:needed], first, last)
        assert (scratch[needed:] == NAN).all()
    return out, lse


def attend_backward(dout, qkv, out, lse, heads, batch, cuts=None):
    dqkv = bits(*qkv.shape)
    for first, last in cuts or [(0, batch * heads)]:
        needed = attention_scratch_bf16(len(qkv) // batch, out.shape[1], heads)
        scratch = aligned(needed, margin=64)
        attention_backward_bf16(dout, qkv, out, lse, batch, heads, dqkv, scratch[:needed], first, last)
        assert (scratch[needed:] == NAN).all()
    return dqkv


def by_head(x, heads, batch):
    """Return float64 [batch, heads, T, D]."""
    return widened(x).reshape(batch, len(x) // batch, heads, -1).transpose(0, 2, 1, 3)


class Exact:
    """What the kernels approximate, in float64, and the errors that their descriptions allow."""

    def __init__(self, qkv, dout, heads, batch):
        rows, width = dout.shape
        context, size = rows // batch, width // heads
        self.out, self.lse, self.dqkv = np.empty((rows, width)), np.empty((batch, heads, context)), np.empty(qkv.shape)
        wide, wide_dout = widened(qkv), widened(dout)
        reference.attention_forward(wide, batch, heads, self.out, self.lse, np.empty(0))
        reference.attention_backward(wide_dout, wide, self.out, self.lse, batch, heads, self.dqkv, np.empty(0))
        q, k, v = (by_head(np.ascontiguousarray(x), heads, batch) for x in np.split(qkv, 3, axis=1))
        do = by_head(dout, heads, batch)
        visible = np.tril(np.ones((context, context), bool))
        scores = np.where(visible, q @ k.swapaxes(-1, -2) / np.sqrt(size), -np.inf)
        p = np.exp(scores - self.lse[..., None])
        g = (np.where(visible, np.abs(q) @ np.abs(k).swapaxes(-1, -2), 0) / np.sqrt(size)).max(axis=-1, keepdims=True)
        r = 2.0**-20 + 2.0**-22 * (context + (size + 8) * g)
        self.lse_error = r[..., 0]
        lost = NORMAL * visible
        self.out_error = self.join((2.0**-7 + r) * (p @ np.abs(v)) + lost @ np.abs(v)) + NORMAL
        r = r.max(axis=(-1, -2), keepdims=True)
        w = np.abs(do) @ np.abs(v).swapaxes(-1, -2)
        inner = w + 2 * (p * w).sum(axis=-1, keepdims=True)
        factor = (2.0**-6 + 2 * r) / np.sqrt(size)
        # A lost p takes its product with (dp - inner sum) along, and that product may be lost itself.
        dscores = factor * p * inner + lost * (1 + inner)
        dweights = (2.0**-7 + r) * p + lost
        parts = dscores @ np.abs(k), dscores.swapaxes(-1, -2) @ np.abs(q), dweights.swapaxes(-1, -2) @ np.abs(do)
        self.dqkv_error = np.concatenate([self.join(part) for part in parts], axis=1) + NORMAL

    def join(self, x):
        batch, heads, context, size = x.shape
        return x.transpose(0, 2, 1, 3).reshape(batch * context, heads * size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("context", "size", "heads", "batch"), SHAPES)
def test_errors_are_within_what_is_stated(context, size, heads, batch, kind):
    qkv, dout = inputs(kind, context, size, heads, batch)
    before = qkv.copy(), dout.copy()
    exact = Exact(qkv, dout, heads, batch)
    out, lse = attend(qkv, heads, batch)
    assert (np.abs(widened(out) - exact.out) <= exact.out_error).all()
    assert (np.abs(lse - exact.lse) <= exact.lse_error).all()
    forward = out.copy(), lse.copy()
    dqkv = attend_backward(dout, qkv, out, lse, heads, batch)
    assert (np.abs(widened(dqkv) - exact.dqkv) <= exact.dqkv_error).all()
    for array, copy in zip((qkv, dout, out, lse), (*before, *forward), strict=True):
        np.testing.assert_array_equal(array, copy)


def test_errors_are_mostly_those_of_one_rounding():
    qkv, dout = inputs("random", 256, 64, 2, 1)
    exact = Exact(qkv, dout, 2, 1)
    out, lse = attend(qkv, 2, 1)
    dqkv = attend_backward(dout, qkv, out, lse, 2, 1)
    for ours, theirs in ((widened(out), exact.out), (widened(dqkv), exact.dqkv)):
        error = ours - theirs
        assert np.sqrt(np.mean(error**2)) < 2.0**-8 * np.sqrt(np.mean(theirs**2))
        assert abs(np.mean(error)) < 2.0**-10 * np.sqrt(np.mean(theirs**2))


@pytest.mark.parametrize("kernel", [attention_forward_bf16, attention_backward_bf16])
def test_every_kernel_has_a_twin_with_its_signature(kernel):
    assert inspect.signature(kernel) == inspect.signature(getattr(reference_bf16, kernel.__name__))
    assert not set(kernel.targetoptions["fastmath"] or ())


@pytest.mark.parametrize(("context", "size", "heads", "batch"), [(33, 24, 2, 3), (64, 32, 3, 2)])
def test_the_twins_compute_the_same_heads(context, size, heads, batch):
    qkv, dout = inputs("random", context, size, heads, batch)
    exact, cut = Exact(qkv, dout, heads, batch), [(1, batch * heads - 1)]
    out, lse = attend(qkv, heads, batch, cut)
    twin, twin_lse = bits(*out.shape), np.full_like(lse, np.nan)
    reference_bf16.attention_forward_bf16(qkv, batch, heads, twin, twin_lse, bits(0), *cut[0])
    np.testing.assert_array_equal(out == NAN, twin == NAN)
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(twin_lse))
    written = twin != NAN
    assert (np.abs(widened(out) - widened(twin)) <= 2 * exact.out_error)[written].all()
    out, lse = attend(qkv, heads, batch)
    dqkv, twin = attend_backward(dout, qkv, out, lse, heads, batch, cut), bits(*qkv.shape)
    reference_bf16.attention_backward_bf16(dout, qkv, out, lse, batch, heads, twin, bits(0), *cut[0])
    np.testing.assert_array_equal(dqkv == NAN, twin == NAN)
    assert (np.abs(widened(dqkv) - widened(twin)) <= 2 * exact.dqkv_error)[twin != NAN].all()


@pytest.mark.parametrize(("context", "size", "heads", "batch"), [(1, 8, 2, 3), (70, 33, 3, 2), (64, 32, 2, 2)])
def test_bits_do_not_depend_on_the_cut(context, size, heads, batch):
    qkv, dout = inputs("random", context, size, heads, batch)
    out, lse = attend(qkv, heads, batch)
    dqkv = attend_backward(dout, qkv, out, lse, heads, batch)
    pairs = batch * heads
    for cuts in ([(pair, pair + 1) for pair in range(pairs)], [(0, 0), (pairs // 2, pairs), (0, pairs // 2)]):
        for ours, theirs in zip(attend(qkv, heads, batch, cuts), (out, lse), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(attend_backward(dout, qkv, out, lse, heads, batch, cuts), dqkv)


@pytest.mark.parametrize(("context", "size"), [(33, 24), (64, 32)])
def test_a_sample_has_the_same_bits_in_any_batch(context, size):
    qkv, dout = inputs("random", context, size, 2, 3)
    out, lse = attend(qkv, 2, 3)
    dqkv = attend_backward(dout, qkv, out, lse, 2, 3)
    one, one_lse = attend(qkv[:context], 2, 1)
    np.testing.assert_array_equal(one, out[:context])
    np.testing.assert_array_equal(one_lse, lse[:1])
    np.testing.assert_array_equal(attend_backward(dout[:context], qkv[:context], one, one_lse, 2, 1), dqkv[:context])


@pytest.mark.parametrize("seen", [1, 31, 32, 40, 64, 69])
def test_queries_do_not_see_later_tokens(seen):
    qkv, dout = inputs("random", 70, 40, 2, 1)
    changed, changed_dout = qkv.copy(), dout.copy()
    changed[seen:] = rounded(np.full((70 - seen, 240), 1e30))
    out, lse = attend(qkv, 2, 1)
    after, after_lse = attend(changed, 2, 1)
    np.testing.assert_array_equal(after[:seen], out[:seen])
    np.testing.assert_array_equal(after_lse[..., :seen], lse[..., :seen])
    changed_dout[:seen] = rounded(np.full((seen, 80), -1e30))
    dqkv = attend_backward(dout, qkv, out, lse, 2, 1)
    after = attend_backward(changed_dout, qkv, out, lse, 2, 1)
    np.testing.assert_array_equal(after[seen:], dqkv[seen:])
    assert (after[:seen] != dqkv[:seen]).any()


def test_one_token_attends_to_itself():
    qkv, dout = inputs("random", 1, 64, 2, 3)
    out, lse = attend(qkv, 2, 3)
    np.testing.assert_array_equal(out, qkv[:, 256:])
    dqkv = attend_backward(dout, qkv, out, lse, 2, 3)
    np.testing.assert_array_equal(dqkv[:, 256:], dout)
    assert np.abs(widened(dqkv[:, :256])).max() < 1e-5


@pytest.mark.parametrize("large", [3e4, 1e6, 1e9])
@pytest.mark.parametrize("size", [33, 64])
def test_scores_beyond_what_float32_resolves_choose_one_key(size, large):
    qkv, dout = inputs("random", 70, size, 1, 1)
    wide = widened(qkv)
    wide[:, :size], wide[:, size : 2 * size] = large, large * 1.01 ** np.arange(70)[:, None]
    qkv[:] = rounded(wide)
    out, lse = attend(qkv, 1, 1)
    assert np.isfinite(lse).all()
    dqkv = attend_backward(dout, qkv, out, lse, 1, 1)
    assert np.isfinite(widened(out)).all()
    assert np.isfinite(widened(dqkv)).all()
    # No probability is above 1.
    assert (np.abs(widened(dqkv)[:, 2 * size :]) <= 1.01 * np.abs(widened(dout)).sum(axis=0)).all()
    keys = widened(qkv)[:, size]
    chosen = [i for i in range(70) if (keys[:i] < keys[i]).all()]
    assert len(chosen) > 30
    np.testing.assert_array_equal(out[chosen], qkv[chosen, 2 * size :])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_not_a_number_goes_in_and_comes_out(part, bad):
    qkv, dout = inputs("random", 70, 64, 1, 1)
    qkv[40, part * 64 + 5] = rounded(np.array([bad]))[0]
    out, lse = attend(qkv, 1, 1)
    assert np.isfinite(widened(out)[:32]).all()
    # A key of infinity may have a score of minus infinity, and then it is not seen.
    seen = slice(40, 70) if part == 1 and bad == np.inf else slice(40, 41)
    assert not np.isfinite(widened(out)[seen]).all()
    assert not np.isfinite(widened(attend_backward(dout, qkv, out, lse, 1, 1))).all()


def test_not_a_number_in_the_gradient_comes_out():
    qkv, dout = inputs("random", 70, 64, 1, 1)
    out, lse = attend(qkv, 1, 1)
    dout[40, 5] = NAN
    dqkv = widened(attend_backward(dout, qkv, out, lse, 1, 1))
    assert np.isnan(dqkv[40, :64]).all()
    assert np.isnan(dqkv[:41, 64:128]).all()
    assert np.isnan(dqkv[:41, 133]).all()


@pytest.mark.parametrize("family", ["vector", "amx"])
def test_other_families_of_kernels(family):
    command = ["pytest", "-q", "-p", "no:faulthandler", "-k", "(stated and 70) or cut or later", __file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), features.VARIABLE: family}
    if family == "amx":
        if sys.platform != "linux" or platform.machine() != "x86_64":
            pytest.skip("tiles are x86-64's")
        if not tile_emulator.is_needed() and not features.request_tiles():
            pytest.skip("the kernel grants no tiles")
        command = ["support.tile_emulator", *command]
        environment |= tile_emulator.environment()
    result = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
