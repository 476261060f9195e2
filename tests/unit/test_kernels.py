"""Every kernel does what its numpy twin does, at odd sizes and in both precisions."""

import inspect

import numpy as np
import pytest
from support.kernels import BATCH, KERNELS, NAN, VOCAB, copies, is_scratch, make_arguments

from hpcpipe.kernels import attention, exponential, loss, reduce, reference

TOLERANCE = {np.float32: 1e-5, np.float64: 4e-13}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("context", "width"), [(1, 3), (7, 15), (131, 51)])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernel_equals_its_twin(name, context, width, dtype):
    arguments = make_arguments(name, dtype, context, width)
    ours, theirs = copies(arguments), copies(arguments)
    result, expected = KERNELS[name](*ours), getattr(reference, name)(*theirs)
    tolerance = TOLERANCE[dtype]
    if expected is not None:
        assert result == pytest.approx(expected, rel=tolerance)
    for got, want, working_space in zip(ours, theirs, is_scratch(KERNELS[name]), strict=True):
        if isinstance(want, np.ndarray) and not working_space:
            assert got.dtype == want.dtype
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(1, np.abs(want).max()))


def test_every_kernel_has_a_twin_with_its_signature():
    assert len(KERNELS) == 21
    for name, kernel in KERNELS.items():
        assert list(inspect.signature(kernel).parameters) == list(
            inspect.signature(getattr(reference, name)).parameters
        )


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_inputs_are_left_as_they_are(name):
    arguments = make_arguments(name, np.float32)
    after = copies(arguments)
    getattr(reference, name)(*after)
    inputs = [
        i
        for i, (a, b) in enumerate(zip(arguments, after, strict=True))
        if isinstance(a, np.ndarray) and not np.isnan(a).any() and np.array_equal(a, b)
    ]
    ours = copies(arguments)
    KERNELS[name](*ours)
    for i in inputs:
        np.testing.assert_array_equal(ours[i], arguments[i])


@pytest.mark.parametrize(
    "name", sorted(set(KERNELS) - {"cross_entropy_forward", "cross_entropy_backward", "digest_blocks"})
)
@pytest.mark.parametrize("bad", [NAN, np.inf])
def test_not_a_number_goes_in_and_comes_out(name, bad):
    arguments = make_arguments(name, np.float32)
    first = next(i for i, value in enumerate(arguments) if getattr(value, "dtype", None) == np.float32)
    broken = copies(arguments)
    broken[first].flat[0] = bad
    result = KERNELS[name](*broken)
    written = [
        value
        for i, (value, scratch) in enumerate(zip(broken, is_scratch(KERNELS[name]), strict=True))
        if isinstance(value, np.ndarray) and not scratch and (i != first or name in ("add_into", "adamw_update"))
    ]
    assert any(not np.isfinite(value).all() for value in written) or not np.isfinite(result)


def test_not_a_number_in_the_logits_reaches_the_loss():
    logits, targets, coefficients, lse = make_arguments("cross_entropy_forward", np.float32)
    logits[3, :] = [NAN] + [1.0] * (VOCAB - 1)
    assert np.isnan(loss.cross_entropy_forward(logits, targets, coefficients, lse))
    assert np.isnan(lse[3])
    dlogits = np.zeros_like(logits)
    loss.cross_entropy_backward(logits, targets, coefficients, lse, dlogits)
    assert np.isnan(dlogits[3]).all()
    assert np.isfinite(np.delete(dlogits, 3, axis=0)).all()


@pytest.mark.parametrize(("name", "source", "target"), [("gelu_forward", 0, 1), ("gelu_backward", 0, 2)])
@pytest.mark.parametrize("context", [7, 131])
def test_gelu_may_write_over_its_input(name, source, target, context):
    arguments = make_arguments(name, np.float32, context, 51)
    apart, shared = copies(arguments), copies(arguments)
    shared[target] = shared[source]
    KERNELS[name](*apart)
    KERNELS[name](*shared)
    np.testing.assert_array_equal(shared[target], apart[target])


def test_gradient_of_logits_may_be_the_logits():
    arguments = make_arguments("cross_entropy_backward", np.float32)
    apart, shared = copies(arguments), copies(arguments)
    shared[4] = shared[0]
    loss.cross_entropy_backward(*apart)
    loss.cross_entropy_backward(*shared)
    np.testing.assert_array_equal(shared[4], apart[4])


def test_rows_of_coefficient_zero_do_not_count():
    logits, targets, coefficients, lse = make_arguments("cross_entropy_forward", np.float32)
    counted = coefficients != 0
    assert (targets[~counted] == -1).all()
    total = loss.cross_entropy_forward(logits, targets, coefficients, lse)
    few = logits[counted], targets[counted], coefficients[counted], lse[counted]
    assert total == loss.cross_entropy_forward(*few)
    logits[~counted] = NAN
    assert total == loss.cross_entropy_forward(logits, targets, coefficients, lse)
    dlogits = np.full_like(logits, NAN)
    loss.cross_entropy_backward(logits, targets, coefficients, lse, dlogits)
    assert (dlogits[~counted] == 0).all()
    coefficients[:] = 0
    assert loss.cross_entropy_forward(logits, targets, coefficients, lse) == 0.0


def test_loss_of_large_logits_is_finite():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    lse = np.empty(1, np.float32)
    total = loss.cross_entropy_forward(logits, np.array([1], np.int32), np.ones(1, np.float32), lse)
    assert total == 2e4


ROWWISE = [
    ("layernorm_forward", (0, 3, 4, 5)),
    ("layernorm_backward_input", (0, 1, 3, 4, 5)),
    ("gelu_forward", (0, 1)),
    ("gelu_backward", (0, 1, 2)),
    ("attention_forward", (0, 3, 4)),
    ("attention_backward", (0, 1, 2, 3, 6)),
    ("cross_entropy_forward", (0, 1, 2, 3)),
    ("cross_entropy_backward", (0, 1, 2, 3, 4)),
    ("embedding_forward", (0, 3)),
]


@pytest.mark.parametrize(("context", "width"), [(1, 3), (7, 15), (131, 51)])
@pytest.mark.parametrize(("name", "batched"), ROWWISE)
def test_a_sample_has_the_same_bits_in_any_batch(name, batched, context, width):
    many = copies(make_arguments(name, np.float32, context, width))
    one = [value[: len(value) // BATCH].copy() if i in batched else value for i, value in enumerate(copies(many))]
    if name.startswith("attention"):
        one[1 if name == "attention_forward" else 4] = 1
    KERNELS[name](*many)
    KERNELS[name](*one)
    for i in batched:
        np.testing.assert_array_equal(one[i], many[i][: len(one[i])])


@pytest.mark.parametrize("name", ["adamw_update", "add_into"])
def test_elementwise_updates_may_be_cut_anywhere(name):
    whole = copies(make_arguments(name, np.float32))
    cut = copies(whole)
    KERNELS[name](*whole)
    for start, stop in ((0, 1), (1, 38), (38, 4099)):
        KERNELS[name](*(value[start:stop] if isinstance(value, np.ndarray) else value for value in cut))
    for got, want in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(got, want)


def test_queries_do_not_see_later_tokens():
    qkv, batch, heads, out, lse, scratch = copies(make_arguments("attention_forward", np.float32, 131, 51))
    attention.attention_forward(qkv, batch, heads, out, lse, scratch)
    changed, after = qkv.copy(), np.empty_like(out)
    changed[100:131] = 9
    attention.attention_forward(changed, batch, heads, after, lse, scratch)
    np.testing.assert_array_equal(after[:100], out[:100])
    assert not np.array_equal(after[100:131], out[100:131])


def test_row_sums_run_upwards_and_are_added_once():
    dy = np.array([[2.0**24], [1.0], [1.0], [-(2.0**24)]], np.float32)
    acc = np.array([0.5], np.float32)
    reduce.bias_gradient(dy, acc, np.empty(1, np.float32))
    assert acc[0] == 0.5


def test_sum_of_squares_is_carried_in_float64():
    x = np.full(100_001, 0.1, np.float32)
    assert reduce.sum_of_squares(x) == pytest.approx(100_001 * float(np.float32(0.1)) ** 2, rel=1e-13)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 7 * 1024, 9 * 1024 + 517])
def test_sums_of_blocks_do_not_depend_on_where_the_array_is_cut(size):
    x = np.random.default_rng(size).normal(size=size).astype(np.float32)
    num_blocks = -(-size // reduce.BLOCK)
    whole = np.empty(num_blocks)
    reduce.block_sums_of_squares(x, whole)
    for first in range(num_blocks):
        part = np.empty(num_blocks - first)
        reduce.block_sums_of_squares(x[first * reduce.BLOCK :], part)
        assert part.tobytes() == whole[first:].tobytes()
        alone = np.empty(1)
        reduce.block_sums_of_squares(x[first * reduce.BLOCK : (first + 1) * reduce.BLOCK].copy(), alone)
        assert alone[0] == whole[first]


def test_exponential_is_accurate_over_all_of_float32():
    x = np.concatenate([np.linspace(-87.3, 88.7, 400_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ours = np.array([exponential._exp_float32(value) for value in x[::37]])
    units = np.abs(ours - exact[::37]) / np.spacing(exact[::37].astype(np.float32))
    assert units.max() < 1.5
    edge = {-np.inf: 0.0, -104.0: 0.0, 0.0: 1.0, 89.0: np.inf, np.inf: np.inf}
    for value, expected in edge.items():
        assert exponential._exp_float32(np.float32(value)) == expected
    assert np.isnan(exponential._exp_float32(np.float32(NAN)))
