"""What a layer owns: the names, shapes and starting values of its tensors, and the sizes of its buffers."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_FLOAT32 = np.dtype(np.float32)
_BLOCK_ROWS = 32
_BLOCK_BYTES = 64
_LAST_STEP = 1 << 30


@dataclass(frozen=True)
class BufferSpec:
    """One buffer that a layer asks for: a C-contiguous array whose rows are ``shape[0]``.

    Attributes
    ----------
    shape : tuple of int
        Its shape.
    dtype : dtype
        Of its elements.
    slack_bytes : int
        Bytes after the last element that kernels may read, and nobody writes: they hold what this or another buffer of
        the same dtype held.
    steps : (int, int)
        Of scratch: the first and the last step in which it is in use. A layer numbers the steps through all of its
        functions as it likes; scratch whose steps do not meet shares memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any] = _FLOAT32
    slack_bytes: int = 0
    steps: tuple[int, int] = (0, _LAST_STEP)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the elements and of what may be read after them."""
        return self.num_bytes + self.slack_bytes

    def used_in(self, first: int, last: int | None = None) -> "BufferSpec":
        """Return the same buffer for scratch that is in use in one step, or from one to another."""
        return replace(self, steps=(first, first if last is None else last))


BufferShapes = dict[str, BufferSpec]
"""Names of a layer's buffers, and what it asks for."""


def f32(*shape: int) -> BufferSpec:
    """Return the spec of a float32 buffer."""
    return BufferSpec(shape)


def f64(*shape: int) -> BufferSpec:
    """Return the spec of a float64 buffer."""
    return BufferSpec(shape, np.dtype(np.float64))


def i32(*shape: int) -> BufferSpec:
    """Return the spec of an int32 buffer, as for tokens."""
    return BufferSpec(shape, np.dtype(np.int32))


def bf16(*shape: int) -> BufferSpec:
    """Return the spec of a bfloat16 buffer: uint16 bits, readable in whole blocks of a product.

    Blocks have 32 rows and read 64 bytes of each, so the rows up to the next multiple of 32 can be read, and 64 bytes
    after them. They hold finite numbers if all bfloat16 buffers do.
    """
    dtype = np.dtype(np.uint16)
    missing_rows = -shape[0] % _BLOCK_ROWS
    return BufferSpec(shape, dtype, missing_rows * math.prod(shape[1:]) * dtype.itemsize + _BLOCK_BYTES)


def raw(num_bytes: int) -> BufferSpec:
    """Return the spec of a buffer of bytes (uint8), 64-byte aligned like all: views of it can have any dtype."""
    return BufferSpec((num_bytes,), np.dtype(np.uint8))


@dataclass(frozen=True)
class TensorSpec:
    """One parameter tensor.

    Attributes
    ----------
    name : str
        Global name, the same in every checkpoint whatever the grid: ``layers/003/attention/qkv/weight``.
    shape : tuple of int
        Matrices are (inputs, outputs); tables are (rows, width).
    initial_std : float
        Standard deviation of the normal starting values; 0 for a constant.
    initial_value : float
        The constant, where `initial_std` is 0.
    tied_to : str
        Global name of the tensor whose values this one shares; empty if it has its own. Each use of a tied tensor
        has its own gradient.
    """

    name: str
    shape: tuple[int, ...]
    initial_std: float = 0.0
    initial_value: float = 0.0
    tied_to: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices and tables, not to biases and norms."""
        return len(self.shape) > 1
