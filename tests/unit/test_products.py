"""Products of bfloat16 operands do what their numpy twins do, at odd sizes, and however they are shared."""

from itertools import pairwise

import numpy as np
import pytest
from support.fresh import RANDOM

from hpcpipe.kernels import bfloat16, panels, products
from hpcpipe.kernels import reference_products as reference
from hpcpipe.kernels.panels import panel_elements

SIZES = [(1, 1, 1), (32, 32, 32), (37, 50, 45), (64, 96, 33), (100, 70, 130), (5, 257, 16), (96, 33, 64)]


def aligned(num_elements, dtype):
    """Return zeroed memory that starts a cache line and can be read behind its end."""
    raw = np.zeros(num_elements * np.dtype(dtype).itemsize + 64 + (1 << 16), np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_elements * np.dtype(dtype).itemsize].view(dtype)


def bits(*shape, scale=1.0):
    """Return random bfloat16 values."""
    out = aligned(int(np.prod(shape)), np.uint16).reshape(shape)
    out[...] = reference.rounded(RANDOM.standard_normal(shape) * scale)
    return out


def floats(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def pack(matrix):
    """Pack float32 whose rows are k."""
    out = aligned(panel_elements(*matrix.shape), np.uint16)
    panels.pack_rows(matrix, out, 0, len(matrix))
    return out


def errors_in_units(found, wanted):
    """Return the largest distance in units in the last place of bfloat16, which has 8 bits."""
    difference = np.abs(reference.widened(found) - reference.widened(wanted))
    exponent = np.floor(np.log2(np.maximum(np.abs(reference.widened(wanted)), 2.0**-100)))
    return float((difference / 2.0 ** (exponent - 7)).max())


def test_rounding_is_to_nearest_even_and_keeps_what_is_not_finite():
    special = [0.0, -0.0, np.inf, -np.inf, 1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, 1e-45, 1e-39, -1e-39, 2.0**-133]
    x = np.concatenate([np.array(special), RANDOM.standard_normal(500) * 2.0 ** RANDOM.integers(-140, 127, 500)])
    x = x.astype(np.float32)[None]
    out, back = np.empty(x.shape, np.uint16), np.empty(x.shape, np.float32)
    bfloat16.to_bfloat16(x, out, 0, 1)
    assert (out == reference.rounded(x)).all()
    bfloat16.from_bfloat16(out, back)
    assert (back == reference.widened(out)).all()
    nan = np.array([[np.nan, -np.nan]], np.float32)
    nan.view(np.uint32)[0, 1] = 0x7FFFFFFF
    bfloat16.to_bfloat16(nan, out[:, :2], 0, 1)
    bfloat16.from_bfloat16(out[:, :2], back[:, :2])
    assert np.isnan(back[:, :2]).all()


@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (32, 32), (50, 45), (33, 64), (96, 77), (31, 100)])
def test_packing_is_the_twins(depth, columns):
    matrix = floats(depth, columns)
    transposed = np.ascontiguousarray(matrix.T)
    rows = reference.rounded(matrix)
    for kernel, source, length, grain in (
        (panels.pack_rows, matrix, depth, 32),
        (panels.pack_columns, transposed, columns, 32),
        (panels.pack_bfloat16_rows, rows, -(-columns // 32), 1),
    ):
        found, wanted = (aligned(panel_elements(depth, columns), np.uint16) for _ in range(2))
        found[:] = wanted[:] = 7
        middle = length // 2 // grain * grain
        for first, last in ((0, middle), (middle, length)):
            kernel(source, found, first, last)
        getattr(reference, kernel.__name__)(source, wanted, 0, length)
        assert (found == wanted).all(), kernel.__name__
        assert (reference.unpacked(found, depth, columns) == rows).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 16), (64, 48), (70, 50), (31, 33)])
def test_transposition_is_the_twins(rows, columns):
    source, first = bits(rows, columns), columns // 3
    found, wanted = (np.full((columns - first, -(-rows // 32) * 32), 7, np.uint16) for _ in range(2))
    panels.transpose(source, found, first, columns)
    reference.transpose(source, wanted, first, columns)
    assert (found == wanted).all()


@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_products_are_within_a_unit_of_their_twins(rows, depth, columns):
    a, b = bits(rows, depth), pack(floats(depth, columns) / np.sqrt(depth, dtype=np.float32))
    bias, hidden = floats(columns), bits(rows, columns, scale=2.0)
    scratch = aligned(products.DEEP_ROWS * -(-columns // 32) * 32, np.float32).reshape(products.DEEP_ROWS, -1)
    for name, arguments in (
        ("product", (a, b)),
        ("linear", (a, b, bias)),
        ("product_gelu_backward", (a, b, hidden)),
    ):
        found, wanted = bits(rows, columns), bits(rows, columns)
        getattr(products, name)(*arguments, found, 0, rows)
        getattr(reference, name)(*arguments, wanted, 0, rows)
        # Where terms cancel, float32 sums differ from exact ones by more than the last place of what is left.
        scale = np.abs(reference.widened(wanted)).max() * 2.0**-7
        difference = np.abs(reference.widened(found) - reference.widened(wanted))
        assert (difference <= np.abs(reference.widened(wanted)) * 2.0**-7 + scale * 1e-3).all(), name
    found, wanted = bits(rows, columns), bits(rows, columns)
    products.product_deep(a, b, depth, found, scratch, 0, rows)
    products.product(a, b, wanted, 0, rows)
    assert (found == wanted).all()


@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_gelu_is_applied_to_what_is_stored(rows, depth, columns):
    a, b, bias = bits(rows, depth), pack(floats(depth, columns)), floats(columns)
    hidden, activated, plain = bits(rows, columns), bits(rows, columns), bits(rows, columns)
    products.linear_gelu(a, b, bias, hidden, activated, 0, rows)
    products.linear(a, b, bias, plain, 0, rows)
    assert (hidden == plain).all()
    again = bits(rows, columns)
    products.gelu_again(hidden, again, 0, rows)
    assert (again == activated).all()
    wanted = reference.rounded(reference._gelu(reference.widened(hidden)))
    far = np.abs(reference.widened(wanted)) > 1e-6
    assert errors_in_units(np.where(far, activated, 0), np.where(far, wanted, 0)) <= 1
    assert (
        np.abs(reference.widened(activated) - reference.widened(wanted)).max()
        <= 2.0**-7 * np.abs(reference.widened(wanted)).max()
    )


@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_float32_ends_are_as_exact_as_float32_sums(rows, depth, columns):
    a, b = bits(rows, depth), pack(floats(depth, columns))
    bias, residual = floats(columns), floats(rows, columns)
    found, wanted = np.empty((rows, columns), np.float32), np.empty((rows, columns))
    products.linear_residual(a, b, bias, residual, found, 0, rows)
    reference.linear_residual(a, b, bias, residual, wanted, 0, rows)
    # Every partial sum is rounded: at most as many roundings as terms, each of half a last place of the sum so far.
    terms = np.abs(reference.widened(a)) @ np.abs(reference.widened(reference.unpacked(b, depth, columns)))
    bound = 2.0**-24 * (depth + 2) * (terms + np.abs(bias) + np.abs(residual))
    assert (np.abs(found - wanted) <= bound).all()

    x, d = bits(rows, depth), bits(rows, columns)
    right = aligned(panel_elements(rows, columns), np.uint16)
    panels.pack_bfloat16_rows(d, right, 0, -(-columns // 32))
    start = floats(depth, columns)
    found, wanted = start.copy(), start.astype(np.float64)
    shape = products.gradient_scratch_rows(rows), -(-rows // 32) * 32
    scratch = aligned(shape[0] * shape[1], np.uint16).reshape(shape)
    products.weight_gradient(x, right, found, scratch, 0, depth)
    reference.weight_gradient(x, right, wanted, scratch, 0, depth)
    terms = np.abs(reference.widened(x)).T @ np.abs(reference.widened(d)) + np.abs(start)
    assert (np.abs(found - wanted) <= 2.0**-24 * (rows + 2) * terms).all()


@pytest.mark.parametrize("cuts", [(0, 32, 100), (0, 64, 96, 100)])
def test_bits_do_not_depend_on_who_computes_which_rows(cuts):
    rows, depth, columns = 100, 300, 70
    a, b, bias = bits(rows, depth), pack(floats(depth, columns)), floats(columns)
    whole, parts = bits(rows, columns), bits(rows, columns)
    products.linear(a, b, bias, whole, 0, rows)
    for first, last in pairwise(cuts):
        products.linear(a, b, bias, parts, first, last)
    assert (whole == parts).all()
    right = aligned(panel_elements(depth, columns), np.uint16)
    panels.pack_bfloat16_rows(bits(depth, columns), right, 0, -(-columns // 32))
    x = bits(depth, rows)
    shape = products.gradient_scratch_rows(depth), -(-depth // 32) * 32
    sums = []
    for part in ((0, rows), cuts):
        gradient = np.zeros((rows, columns), np.float32)
        scratch = aligned(shape[0] * shape[1], np.uint16).reshape(shape)
        for first, last in pairwise(part):
            products.weight_gradient(x, right, gradient, scratch, first, last)
        sums.append(gradient)
    assert (sums[0] == sums[1]).all()


def test_rows_behind_the_end_are_neither_read_into_results_nor_written():
    rows, depth, columns = 33, 40, 20
    a, b, bias = bits(rows, depth), pack(floats(depth, columns)), floats(columns)
    out = bits(rows + 31, columns)
    before = out.copy()
    products.linear(a, b, bias, out[:rows], 0, rows)
    assert (out[rows:] == before[rows:]).all()
    assert (out[:rows] != before[:rows]).any()
