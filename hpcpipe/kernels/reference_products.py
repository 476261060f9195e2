"""Plain-numpy twins of ``bfloat16``, ``panels`` and ``products``: what the kernels compute, one statement each.

Sums are float64; what a kernel rounds to bfloat16 is rounded once.
"""

import math
from typing import Any

import numpy as np

from hpcpipe.kernels.arrays import BFloats, Floats, Panels

# Shapes and meaning are in the modules of the kernels.
# ruff: noqa: D103


def rounded(x: Floats) -> BFloats:
    """Return the bits of the nearest bfloat16 values, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def widened(x: BFloats) -> Floats:
    """Return the values of bfloat16 bits in float64."""
    # Casting NaN is no mistake here.
    with np.errstate(invalid="ignore"):
        wide: Floats = (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return wide


def packed(matrix: BFloats) -> Panels:
    """Return the panels of a matrix whose rows are k."""
    depth, columns = matrix.shape
    steps, num_panels = -(-depth // 32), -(-columns // 32)
    whole = np.zeros((steps * 32, num_panels * 32), np.uint16)
    whole[:depth, :columns] = matrix
    return whole.reshape(steps, 16, 2, num_panels, 2, 16).transpose(3, 0, 4, 1, 5, 2).reshape(-1)


def unpacked(panels: Panels, depth: int, columns: int) -> BFloats:
    """Return the matrix that panels were packed from."""
    steps, num_panels = -(-depth // 32), -(-columns // 32)
    whole = panels.reshape(num_panels, steps, 2, 16, 16, 2).transpose(1, 3, 5, 0, 2, 4)
    return whole.reshape(steps * 32, num_panels * 32)[:depth, :columns]


def to_bfloat16(x: Floats, out: BFloats, first: int, last: int) -> None:
    out[first:last] = rounded(x[first:last])


def from_bfloat16(x: BFloats, out: Floats) -> None:
    out[:] = widened(x)


def pack_rows(source: Floats, panels: Panels, first_row: int, last_row: int) -> None:
    _copy_steps(packed(rounded(source)), panels, -(-len(source) // 32), first_row, last_row)


def pack_columns(source: Floats, panels: Panels, first_row: int, last_row: int) -> None:
    _copy_panels(packed(rounded(source).T), panels, source.shape[1], first_row // 32, -(-last_row // 32))


def pack_bfloat16_rows(source: BFloats, panels: Panels, first_panel: int, last_panel: int) -> None:
    _copy_panels(packed(source), panels, len(source), first_panel, last_panel)


def _copy_steps(whole: Panels, panels: Panels, steps: int, first_row: int, last_row: int) -> None:
    chosen = slice(first_row // 32, -(-last_row // 32))
    panels.reshape(-1, steps, 1024)[:, chosen] = whole.reshape(-1, steps, 1024)[:, chosen]


def _copy_panels(whole: Panels, panels: Panels, depth: int, first: int, last: int) -> None:
    size = -(-depth // 32) * 1024
    panels[first * size : last * size] = whole[first * size : last * size]


def transpose(source: BFloats, target: BFloats, first_column: int, last_column: int) -> None:
    rows = len(source)
    target[: last_column - first_column, : -(-rows // 32) * 32] = 0
    target[: last_column - first_column, :rows] = source[:, first_column:last_column].T


def _times(a: BFloats, b: Panels, columns: int) -> Any:
    return widened(a) @ widened(unpacked(b, a.shape[1], columns))


def _gelu(x: Floats) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_slope(x: Floats) -> Any:
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope


def product(a: BFloats, b: Panels, out: BFloats, first: int, last: int) -> None:
    out[first:last] = rounded(_times(a[first:last], b, out.shape[1]))


def linear(a: BFloats, b: Panels, bias: Floats, out: BFloats, first: int, last: int) -> None:
    out[first:last] = rounded(_times(a[first:last], b, out.shape[1]) + bias)


def linear_gelu(
    a: BFloats, b: Panels, bias: Floats, hidden: BFloats, activated: BFloats, first: int, last: int
) -> None:
    linear(a, b, bias, hidden, first, last)
    activated[first:last] = rounded(_gelu(widened(hidden[first:last])))


def gelu_again(hidden: BFloats, activated: BFloats, first: int, last: int) -> None:
    activated[first:last] = rounded(_gelu(widened(hidden[first:last])))


def product_gelu_backward(a: BFloats, b: Panels, hidden: BFloats, out: BFloats, first: int, last: int) -> None:
    slope = _gelu_slope(widened(hidden[first:last]))
    out[first:last] = rounded(_times(a[first:last], b, out.shape[1]) * slope)


def linear_residual(a: BFloats, b: Panels, bias: Floats, residual: Floats, out: Floats, first: int, last: int) -> None:
    out[first:last] = residual[first:last] + (_times(a[first:last], b, out.shape[1]) + bias)


def weight_gradient(x: BFloats, d: Panels, gradient: Floats, scratch: BFloats, first: int, last: int) -> None:
    gradient[first:last] += widened(x[:, first:last]).T @ widened(unpacked(d, len(x), gradient.shape[1]))


def product_deep(a: BFloats, b: Panels, depth: int, out: BFloats, scratch: Floats, first: int, last: int) -> None:
    out[first:last] = rounded(_times(a[first:last, :depth], b, out.shape[1]))
