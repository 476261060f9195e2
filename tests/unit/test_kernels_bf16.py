"""What lies between products of bfloat16 operands: each kernel against float64, within the error that it states."""

import inspect

import numpy as np
import pytest
from support.fresh import RANDOM

from hpcpipe.kernels import (
    adamw,
    adamw_bf16,
    exponential,
    head,
    norm_bf16,
    panels,
    reduce_bf16,
    reference,
    reference_bf16,
)
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.panels import panel_elements
from hpcpipe.kernels.reference_products import rounded, widened

HALF = 2.0**-8 * (1 + 2.0**-10)
"""Largest error of rounding to bfloat16, relative to the value, if what is rounded is nearly exact."""
SMALLEST = 2.0**-126
SIZES = [(1, 1), (3, 31), (7, 32), (50, 33), (64, 768), (33, 1100)]


def aligned(num_elements, dtype):
    """Return zeroed memory that starts a cache line and can be read behind its end."""
    raw = np.zeros(num_elements * np.dtype(dtype).itemsize + 64 + (1 << 16), np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_elements * np.dtype(dtype).itemsize].view(dtype)


def floats(*shape, scale=1.0):
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


def bits(*shape, scale=1.0):
    out = aligned(int(np.prod(shape)), np.uint16).reshape(shape)
    out[...] = rounded(floats(*shape, scale=scale))
    return out


def streams(rows, width):
    """Rows of several kinds: random, far from zero, tiny, large, of equal elements."""
    kinds = [
        floats(rows, width),
        1000 + floats(rows, width),
        floats(rows, width, scale=1e-20),
        floats(rows, width, scale=1e-39),
        floats(rows, width, scale=1e6),
        np.repeat(floats(rows, 1, scale=1e4), width, axis=1),
        np.zeros((rows, width), np.float32),
    ]
    return np.stack(kinds)[RANDOM.integers(0, len(kinds), rows), np.arange(rows)]


def cuts(length, grain=1):
    middle = length // 2 // grain * grain
    return [(0, middle), (middle, length)]


def moments(x):
    exact = x.astype(np.float64)
    return exact.mean(axis=1, keepdims=True), 1 / np.sqrt(exact.var(axis=1, keepdims=True) + 1e-5)


KERNELS = [
    value
    for module in (adamw_bf16, norm_bf16, reduce_bf16, head)
    for value in vars(module).values()
    if hasattr(value, "signatures") and value.__module__ == module.__name__ and not value.__name__.startswith("_")
]


@pytest.mark.parametrize("ours", KERNELS, ids=lambda ours: ours.__name__)
def test_every_kernel_has_a_twin_with_its_signature(ours):
    assert len(KERNELS) == 8
    assert inspect.signature(ours) == inspect.signature(getattr(reference_bf16, ours.__name__))
    assert not set(ours.targetoptions["fastmath"] or ())


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_layernorm_forward(rows, width):
    x, weight, bias = streams(rows, width), floats(width), floats(width)
    out, wanted = np.full((2, rows, width), 7, np.uint16)
    (mean, rstd), (wanted_mean, wanted_rstd) = np.full((2, 2, rows), np.nan, np.float32)
    for first, last in cuts(rows):
        norm_bf16.layernorm_forward_bf16(x, weight, bias, out, mean, rstd, first, last)
    reference_bf16.layernorm_forward_bf16(x, weight, bias, wanted, wanted_mean, wanted_rstd, 0, rows)
    np.testing.assert_allclose(rstd, wanted_rstd, rtol=2.0**-20)
    assert (np.abs(mean - wanted_mean) <= 2.0**-22 * np.abs(x).max(axis=1)).all()
    average, scale = moments(x)
    exact = (x - average) * scale * weight + bias
    bound = 2.0**-20 * (np.abs(weight) * scale * np.abs(x).max(axis=1, keepdims=True) + np.abs(exact) + np.abs(bias))
    assert (np.abs(widened(out) - exact) <= HALF * np.abs(exact) + bound).all()
    assert (np.abs(widened(out) - widened(wanted)) <= 2 * HALF * np.abs(exact) + bound).all()


def test_equal_elements_give_the_bias():
    x = np.repeat(np.array([1e6, 0.1, -3e-5, 0], np.float32)[:, None], 768, axis=1)
    weight, bias, out = floats(768), floats(768), np.empty((4, 768), np.uint16)
    mean, rstd = np.empty((2, 4), np.float32)
    norm_bf16.layernorm_forward_bf16(x, weight, bias, out, mean, rstd, 0, 4)
    assert (out == rounded(bias)).all()
    np.testing.assert_allclose(rstd, 1e-5**-0.5, rtol=1e-6)


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_layernorm_backward_input(rows, width):
    x, weight, dout = streams(rows, width), floats(width), bits(rows, width)
    dout[::3] = bits(len(dout[::3]), width, scale=1e-30)
    average, scale = moments(x)
    mean, rstd = average[:, 0].astype(np.float32), scale[:, 0].astype(np.float32)
    before = floats(rows, width)
    dx, wanted = before.copy(), before.copy()
    out, wanted_out = np.full((2, rows, width), 7, np.uint16)
    for first, last in cuts(rows):
        norm_bf16.layernorm_backward_input_bf16(dout, x, weight, mean, rstd, dx, out, first, last)
    assert (out == rounded(dx)).all()
    reference_bf16.layernorm_backward_input_bf16(dout, x, weight, mean, rstd, wanted, wanted_out, 0, rows)
    n = np.abs((x.astype(np.float64) - mean[:, None]) * rstd[:, None]).max(axis=1, keepdims=True)
    g = np.abs(widened(dout) * weight).max(axis=1, keepdims=True)
    bound = 2.0**-20 * rstd[:, None] * (1 + n) ** 2 * g + 2.0**-22 * (np.abs(wanted) + np.abs(before))
    assert (np.abs(dx.astype(np.float64) - wanted) <= bound).all()
    assert (np.abs(widened(out) - widened(wanted_out)) <= 2 * HALF * np.abs(wanted) + 2 * bound).all()


@pytest.mark.parametrize(("rows", "width"), [*SIZES, (5, 2100)])
def test_layernorm_backward_weight(rows, width):
    x, dout = floats(rows, width), bits(rows, width)
    mean, rstd = (value[:, 0].astype(np.float32) for value in moments(x))
    ours, theirs = (floats(2, width),) * 2
    ours, theirs = ours.copy(), theirs.copy()
    for first, last in cuts(width):
        norm_bf16.layernorm_backward_weight_bf16(dout, x, mean, rstd, *ours, first, last)
    reference_bf16.layernorm_backward_weight_bf16(dout, x, mean, rstd, *theirs, 0, width)
    terms = np.abs(widened(dout)) * [np.abs((x - mean[:, None]) * rstd[:, None]), np.ones_like(x)]
    assert (np.abs(ours - theirs) <= 2.0**-24 * ((rows + 4) * terms.sum(axis=1) + 2 * np.abs(theirs))).all()


@pytest.mark.parametrize(("rows", "width"), [*SIZES, (5, 2100), (6, 1024)])
def test_bias_gradient(rows, width):
    d, before = bits(rows, width), floats(width)
    d[RANDOM.random((rows, width)) < 0.1] = 1
    ours, theirs = before.copy(), before.copy()
    for first, last in cuts(width):
        reduce_bf16.bias_gradient_bf16(d, ours, first, last)
    reference_bf16.bias_gradient_bf16(d, theirs, 0, width)
    assert (np.abs(ours - theirs) <= 2.0**-24 * (rows * np.abs(widened(d)).sum(axis=0) + 2 * np.abs(theirs))).all()


@pytest.mark.parametrize("rows", range(4, 9))
def test_row_sums_run_upwards_and_are_added_once(rows):
    column = np.zeros((rows, 1), np.float32)
    column[:3, 0], column[-1, 0] = [2.0**24, 1.0, 1.0], -(2.0**24)
    acc = np.array([0.5], np.float32)
    reduce_bf16.bias_gradient_bf16(rounded(column), acc, 0, 1)
    assert acc[0] == 0.5
    acc, other = np.array([0.5], np.float32), np.zeros(1, np.float32)
    mean, rstd, x = np.zeros(rows, np.float32), np.ones(rows, np.float32), np.ones((rows, 1), np.float32)
    norm_bf16.layernorm_backward_weight_bf16(rounded(column), x, mean, rstd, acc, other, 0, 1)
    assert acc[0] == 0.5
    assert other[0] == 0.0


class Head:
    """A head with logits of a chosen size."""

    def __init__(self, rows, width, vocab, scale):
        self.vocab, self.rows, self.width = vocab, rows, width
        self.a, self.table = bits(rows, width), floats(vocab, width, scale=scale / width**0.5)
        self.packed = aligned(panel_elements(width, vocab), np.uint16)
        panels.pack_columns(self.table, self.packed, 0, vocab)
        self.targets = RANDOM.integers(0, vocab, rows, dtype=np.int32)
        self.coefficients = np.abs(floats(rows))
        self.coefficients[1::5], self.targets[1::5] = 0, -1
        self.columns = -(-vocab // 32) * 32 + 32

    def logits(self, function=head.head_logits, parts=None):
        logits = aligned(self.rows * self.columns, np.uint16).reshape(self.rows, self.columns)
        logits[:] = 7
        highest, total = np.full(self.rows, np.nan, np.float32), np.full((self.rows, 16), np.nan, np.float32)
        for first, last in parts or [(0, self.rows)]:
            function(self.a, self.packed, self.vocab, logits, highest, total, first, last)
        return logits, highest, total


HEADS = [(1, 1, 1, 1), (32, 32, 32, 1), (37, 50, 45, 3), (64, 33, 1000, 300), (70, 100, 333, 20), (5, 257, 16, 1e4)]


@pytest.mark.parametrize(("rows", "width", "vocab", "scale"), HEADS)
def test_logits_and_the_sums_of_their_exponentials(rows, width, vocab, scale):
    case = Head(rows, width, vocab, scale)
    logits, highest, total = case.logits()
    padded = -(-vocab // 32) * 32
    assert (logits[:, vocab:padded] == 0).all()
    assert (logits[:, padded:] == 7).all()
    wanted, _, _ = case.logits(reference_bf16.head_logits)
    exact = widened(case.a) @ widened(rounded(case.table)).T
    magnitudes = np.abs(widened(case.a)) @ np.abs(widened(rounded(case.table))).T
    values = widened(logits[:, :vocab])
    assert (np.abs(values - exact) <= HALF * np.abs(exact) + 2.0**-22 * magnitudes).all()
    assert (np.abs(values - widened(wanted[:, :vocab])) <= 2 * HALF * np.abs(exact) + 2.0**-22 * magnitudes).all()
    assert (highest <= values.max(axis=1)).all()
    sums = np.exp(values - highest[:, None]).sum(axis=1)
    np.testing.assert_allclose(total.astype(np.float64).sum(axis=1), sums, rtol=2.0**-20)


def test_a_row_has_the_same_bits_however_rows_are_shared():
    case = Head(100, 96, 500, 30)
    whole = case.logits()
    for parts in ([(0, 32), (32, 100)], [(64, 100), (32, 64), (0, 32)]):
        for one, other in zip(whole, case.logits(parts=parts), strict=True):
            np.testing.assert_array_equal(one, other)


def test_sums_survive_logits_that_rise_and_fall_by_hundreds():
    case = Head(32, 32, 320, 1)
    case.a[:] = rounded(np.eye(32))
    for values in (np.linspace(-3e4, 3e4, 320), np.linspace(3e4, -3e4, 320), floats(320, scale=100), np.full(320, 88)):
        case.table[:] = values.astype(np.float32)[:, None]
        panels.pack_columns(case.table, case.packed, 0, 320)
        logits, highest, total = case.logits()
        exact = widened(logits[:, :320])
        lse = exact.max(axis=1) + np.log(np.exp(exact - exact.max(axis=1, keepdims=True)).sum(axis=1))
        found = highest + np.log(total.astype(np.float64).sum(axis=1))
        np.testing.assert_allclose(found, lse, rtol=0, atol=2.0**-20)


def test_what_is_not_a_number_reaches_the_sum_of_its_row():
    case = Head(33, 64, 70, 1)
    case.a[5, 3] = 0x7FC0
    _, _, total = case.logits()
    assert np.isnan(total[5].sum())
    assert np.isfinite(np.delete(total, 5, axis=0)).all()


@pytest.mark.parametrize(("rows", "width", "vocab", "scale"), HEADS)
def test_cross_entropy_forward(rows, width, vocab, scale):
    case = Head(rows, width, vocab, scale)
    logits, highest, total = case.logits()
    (lse, wanted_lse) = np.full((2, rows), np.nan, np.float32)
    arguments = logits, case.targets, case.coefficients, highest, total
    loss = head.cross_entropy_forward_bf16(*arguments, lse)
    assert loss == pytest.approx(reference_bf16.cross_entropy_forward_bf16(*arguments, wanted_lse), rel=1e-12)
    np.testing.assert_allclose(lse, wanted_lse, rtol=2.0**-23)
    counted = case.coefficients != 0
    values = widened(logits[:, :vocab])
    exact = values.max(axis=1) + np.log(np.exp(values - values.max(axis=1, keepdims=True)).sum(axis=1))
    losses = (exact - values[np.arange(rows), case.targets])[counted]
    weights = case.coefficients[counted].astype(np.float64)
    assert loss == pytest.approx((weights * losses).sum(), rel=1e-12, abs=2.0**-20 * weights.sum())
    logits[~counted] = 0x7FC0
    total[~counted] = np.nan
    assert head.cross_entropy_forward_bf16(*arguments, lse) == loss


@pytest.mark.parametrize(("rows", "width", "vocab", "scale"), HEADS)
def test_cross_entropy_backward(rows, width, vocab, scale):
    case = Head(rows, width, vocab, scale)
    logits, highest, total = case.logits()
    lse = np.empty(rows, np.float32)
    head.cross_entropy_forward_bf16(logits, case.targets, case.coefficients, highest, total, lse)
    wanted, apart, values = logits.copy(), np.full_like(logits, 9), widened(logits[:, :vocab])
    arguments = vocab, case.targets, case.coefficients, lse
    head.cross_entropy_backward_bf16(logits, *arguments, apart, 0, rows)
    for first, last in cuts(rows):
        head.cross_entropy_backward_bf16(logits, *arguments, logits, first, last)
    padded = -(-vocab // 32) * 32
    np.testing.assert_array_equal(logits[:, :padded], apart[:, :padded])
    assert (apart[:, vocab:padded] == 0).all()
    assert (apart[:, padded:] == 9).all()
    reference_bf16.cross_entropy_backward_bf16(wanted, *arguments, wanted, 0, rows)
    np.testing.assert_array_equal(logits[:, vocab:], wanted[:, vocab:])
    assert (logits[case.coefficients == 0, :vocab] == 0).all()
    exact = np.empty_like(values)
    reference.cross_entropy_backward(
        values, case.targets, case.coefficients.astype(np.float64), lse.astype(np.float64), exact
    )
    # The kernel subtracts lse in float32, as a difference of numbers of that size.
    subtraction = 2.0**-24 * (np.abs(values) + np.abs(lse[:, None]))
    bound = (HALF + 2.0**-17 + subtraction) * np.abs(exact) + SMALLEST * (1 + case.coefficients[:, None])
    assert (np.abs(widened(logits[:, :vocab]) - exact) <= bound).all()
    assert (np.abs(widened(wanted[:, :vocab]) - exact) <= bound).all()


def test_gradient_of_a_target_that_is_nearly_certain_is_accurate():
    values = np.zeros((1, 32), np.float32)
    values[0, 3] = 12
    logits, one = rounded(values), np.ones(1, np.float32)
    lse = np.log(np.exp(values.astype(np.float64)).sum(axis=1))
    target = np.array([3], np.int32)
    head.cross_entropy_backward_bf16(logits, 32, target, one, lse.astype(np.float32), logits, 0, 1)
    wanted = np.expm1(12 - np.float64(lse.astype(np.float32)[0]))
    assert widened(logits)[0, 3] == pytest.approx(wanted, rel=HALF)


@kernel
def short_exponentials(x, out):
    for i in range(x.shape[0]):
        out[i] = exponential.exp_short(x[i])


def test_short_exponential_over_all_of_float32():
    x = RANDOM.integers(0, 2**32, 2_000_000, dtype=np.uint32).view(np.float32)
    near = RANDOM.uniform(-104, 90, 2_000_000).astype(np.float32)
    x = np.concatenate([x, near, np.array([0, -0.0, np.inf, -np.inf, -87.7, -104, 88.4, 1e-45], np.float32)])
    out = np.empty_like(x)
    short_exponentials(x, out)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.exp(x.astype(np.float64))
    assert np.isnan(out[np.isnan(x)]).all()
    ordinary = (exact > SMALLEST) & (x < 88.37)
    assert (np.abs(out[ordinary] / exact[ordinary] - 1)).max() < 2.0**-17
    assert (np.abs(out[exact <= SMALLEST] - exact[exact <= SMALLEST])).max() < SMALLEST
    assert (out[x < -87.7] == 0).all()
    assert (out[x > 88.4] == np.inf).all()
    assert (out[exact > 1e-300] >= 0).all()


# The last two are large enough to be stored past the caches.
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (64, 96), (100, 1100), (500, 1100), (1088, 544)])
def test_update_and_packing_in_one_pass_are_those_of_two(shape):
    weight, grad, moment1 = floats(*shape), floats(*shape), floats(*shape)
    before = [weight, grad, moment1, np.abs(floats(*shape))]
    numbers = (0.7, 3e-3, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**3, 1 - 0.95**3)
    ours, apart, theirs = ([array.copy() for array in before] for _ in range(3))
    found, wanted, twins = (
        [aligned(panel_elements(*shape), np.uint16), aligned(panel_elements(*shape[::-1]), np.uint16)] for _ in range(3)
    )
    for first, last in cuts(shape[0], 32):
        adamw_bf16.adamw_pack(*ours, *numbers, *found, first, last)
        assert (found[1].reshape(-1, panel_elements(shape[1], 32))[-(-last // 32) :] == 0).all()
    adamw.adamw_update(*(array.reshape(-1) for array in apart), *numbers)
    panels.pack_rows(apart[0], wanted[0], 0, shape[0])
    panels.pack_columns(apart[0], wanted[1], 0, shape[0])
    for one, other in zip([*ours, *found], [*apart, *wanted], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(ours[1], grad)
    reference_bf16.adamw_pack(*theirs, *numbers, *twins, 0, shape[0])
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, twins, strict=True):
        assert (np.abs(widened(one) - widened(other)) <= 2 * HALF * np.abs(widened(other)) + 1e-5).all()
