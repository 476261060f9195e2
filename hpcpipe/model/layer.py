"""What every kind of layer offers to a stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpcpipe.kernels.threads import ALONE, Team
from hpcpipe.model.tensors import BufferShapes, TensorSpec

Arrays = Mapping[str, np.ndarray]
Poll = Callable[[], None]


@dataclass
class Microbatch:
    """What the first and the last layer read, and what the last one finds.

    Attributes
    ----------
    tokens : ndarray of int32, shape (batch, context)
        Inputs of the embedding.
    targets : ndarray of int32, shape (batch, context)
        Token that follows each input; -1 where there is none.
    coefficients : ndarray of float32, shape (batch, context)
        Weight of each target in the loss; 0 where there is none.
    loss : float
        Set by the head's forward: sum over targets of coefficient times negative log-likelihood, in nats.
    """

    tokens: np.ndarray
    targets: np.ndarray
    coefficients: np.ndarray
    loss: float = 0.0


@dataclass(frozen=True)
class Buffers:
    """The buffers of one layer for one microbatch, all owned by the stage.

    Attributes
    ----------
    stash : mapping of ndarray
        What the forward leaves for the backward.
    upstream : mapping of ndarray
        What the input gradient leaves for the weight gradient.
    scratch : mapping of ndarray
        What one call needs and leaves to nobody.
    team : Team
        The threads that share its products.
    """

    stash: Arrays
    upstream: Arrays
    scratch: Arrays
    team: Team = ALONE


class Layer(Protocol):
    """A layer computes on buffers that its stage owns, and keeps nothing between calls.

    `x` and `out` are residual streams of shape (batch * context, width). `weights` and `gradients` map the layer's
    local tensor names (the global name without `prefix`) to arrays; gradients are added to. `poll` is called between
    kernels, so that messages move while a stage computes.
    """

    @property
    def prefix(self) -> str:
        """The start of the global names of its tensors."""
        ...

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors that it uses, in a fixed order."""
        ...

    @property
    def packed(self) -> tuple[str, ...]:
        """The local names of the matrices that it reads as right operands of bfloat16 products.

        ``weights`` then holds ``<name>:rows`` for products with the matrix and ``<name>:columns`` for those with its
        transpose, as `hpcpipe.kernels.panels` packs them.
        """
        ...

    @property
    def cheap(self) -> tuple[str, ...]:
        """The names in its stash that `recompute` can fill again; only `forward` and `backward_weight` may use them."""
        ...

    def stash_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of the stash for a batch of samples."""
        ...

    def upstream_shapes(self, batch: int) -> BufferShapes:
        """Return the shapes of what goes from the input gradient to the weight gradient."""
        ...

    def scratch_shapes(self, batch: int, num_threads: int = 1) -> BufferShapes:
        """Return the shapes of the scratch of one call."""
        ...

    def forward_flops(self, batch: int) -> int:
        """Return the floating-point operations of a forward; each half of the backward costs about as much."""
        ...

    def forward(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, out: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Compute `out` from `x`, or from the microbatch's tokens, and fill the stash."""
        ...

    def backward_input(
        self, weights: Arrays, microbatch: Microbatch, x: np.ndarray, d: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Turn `d`, the gradient of the output, into that of the input, in place, and fill `buffers.upstream`."""
        ...

    def backward_weight(
        self, gradients: Arrays, microbatch: Microbatch, x: np.ndarray, buffers: Buffers, poll: Poll
    ) -> None:
        """Add the gradients of the layer's tensors."""
        ...

    def recompute(self, weights: Arrays, x: np.ndarray, buffers: Buffers, poll: Poll) -> None:
        """Fill the cheap part of the stash from `x` and the rest of it, with the bits that `forward` left there.

        Called before `backward_weight` where the cheap part is not kept.
        """
        ...


class KeepsEverything:
    """A layer with no stash that is cheap to compute again."""

    cheap: tuple[str, ...] = ()

    def recompute(self, weights: Arrays, x: np.ndarray, buffers: Buffers, poll: Poll) -> None:
        """Do nothing."""
