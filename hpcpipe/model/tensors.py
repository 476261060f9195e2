"""What a layer owns: the names, shapes and starting values of its tensors, and the sizes of its buffers."""

import math
from dataclasses import dataclass

BufferShapes = dict[str, tuple[int, ...]]


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
