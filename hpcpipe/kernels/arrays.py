"""The array types that kernels take."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
"""A C-contiguous array of float32 or float64."""

Tokens: TypeAlias = npt.NDArray[np.int32]
"""A C-contiguous array of token ids."""

BFloats: TypeAlias = npt.NDArray[np.uint16]
"""A C-contiguous array of bfloat16, as bits."""

Panels: TypeAlias = npt.NDArray[np.uint16]
"""A packed right operand of a product, as `hpcpipe.kernels.panels` lays it out."""
