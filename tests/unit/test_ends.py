"""Ends of products on all bfloat16 values: in vectors and one by one, within the errors that are stated."""

import numpy as np
import pytest
from support.fresh import RANDOM

from hpcpipe.kernels import bfloat16, ends, gelu
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.reference_products import _gelu, _gelu_slope, rounded, widened

HALF = 2.0**-8
TINY = 1e-31
ALL = np.arange(2**16, dtype=np.uint16)
FINITE = np.isfinite(widened(ALL))


@kernel
def in_vectors(row, bias, hidden, activated, slope, shifted):
    for start in range(0, row.shape[0], 32):
        line, pairs = row.ctypes.data + start * 4, start * 2
        zero = bias.ctypes.data
        ends.gelu_row(line, zero, hidden.ctypes.data + pairs, activated.ctypes.data + pairs)
        ends.bias_row(line, zero, shifted.ctypes.data + pairs)
        ends.gelu_slope_row(zero + 128, hidden.ctypes.data + pairs, slope.ctypes.data + pairs)


@kernel
def one_by_one(row, activated, slope):
    for i in range(row.shape[0]):
        activated[i] = gelu.gelu(row[i])
        slope[i] = gelu.gelu_slope(row[i])


@np.errstate(invalid="ignore")
def test_gelu_and_its_derivative_of_all_values():
    row = widened(ALL).astype(np.float32)
    hidden, activated, slope, shifted = np.zeros((4, 2**16), np.uint16)
    in_vectors(row, np.repeat(np.array([0, 1], np.float32), 32), hidden, activated, slope, shifted)
    normal = np.abs(row) >= 2.0**-126
    assert (hidden[FINITE & normal] == ALL[FINITE & normal]).all()
    assert (shifted == hidden).all()
    x = widened(ALL)
    middle = np.clip(x, -1e3, 1e3)
    # 1 + tanh cancels for large negative numbers.
    tail = np.clip(x, -20, 0)
    tail = tail / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (tail + 0.044715 * tail**3)))
    wanted = np.select([x < -3, x > 1e3], [tail, x], _gelu(middle))
    wanted_slope = _gelu_slope(middle)
    alone, alone_slope = np.zeros((2, 2**16), np.float32)
    one_by_one(row, alone, alone_slope)
    for found, found_slope, units in ((widened(activated), widened(slope), HALF), (alone, alone_slope, 0.0)):
        bound = (2.0**-15 + units) * np.abs(wanted) + TINY
        assert (np.abs(found - wanted) <= bound)[FINITE].all()
        assert (np.abs(found_slope - wanted_slope) <= 2.0**-15 + units * np.abs(wanted_slope))[FINITE].all()
        assert np.isnan(found[np.isnan(row)]).all()
        assert np.isnan(found_slope[np.isnan(row)]).all()
        assert found[row == np.inf] == np.inf
        assert found_slope[row == np.inf] == 1


def test_derivative_is_that_of_gelu():
    x, step = RANDOM.uniform(-6, 6, 20_000), 1e-5
    hidden, slope, unused = np.zeros((3, x.size), np.uint16)
    bfloat16.to_bfloat16(x.astype(np.float32)[None], hidden[None], 0, 1)
    x = widened(hidden)
    differences = (_gelu(x + step) - _gelu(x - step)) / (2 * step)
    row, bias = x.astype(np.float32), np.repeat(np.array([0, 1], np.float32), 32)
    in_vectors(row, bias, hidden, unused, slope, unused)
    assert (np.abs(widened(slope) - differences) <= HALF * np.abs(differences) + 2.0**-14).all()


@kernel
def sums(row, bias, residual, target, total, short, whole):
    ends.residual_row(row.ctypes.data, bias.ctypes.data, residual.ctypes.data, target.ctypes.data)
    ends.add_row(row.ctypes.data, total.ctypes.data)
    ends.round_row(row.ctypes.data, short.ctypes.data)
    ends.bias_row(row.ctypes.data, bias.ctypes.data, whole.ctypes.data)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rows_are_added_and_rounded_as_written(scale):
    row, bias, residual, total = (RANDOM.standard_normal((4, 32)) * scale).astype(np.float32)
    target, short, whole, before = np.empty(32, np.float32), *np.empty((2, 32), np.uint16), total.copy()
    sums(row, bias, residual, target, total, short, whole)
    assert (target == residual + (row + bias)).all()
    assert (total == before + row).all()
    assert (short == rounded(row)).all()
    assert (whole == rounded(row + bias)).all()
