"""A stage: a contiguous range of layers that computes forward and both halves of the backward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcpipe.kernels.threads import Team
from hpcpipe.memory.arena import bytes_of, cut_block, new_arrays, new_block
from hpcpipe.model.layer import ALONE, Arrays, Buffers, Layer, Microbatch, Poll
from hpcpipe.model.tensors import BufferShapes
from hpcpipe.pipeline.parameters import Parameters


@dataclass
class Stash:
    """What the forward of one microbatch leaves for its backward.

    Attributes
    ----------
    streams : list of ndarray
        The residual stream between the layers of the stage, one less than there are layers.
    layers : list of mapping
        Each layer's stash; a single shared one for all microbatches where activations are recomputed.
    """

    streams: list[np.ndarray]
    layers: list[Arrays]


class Stage:
    """Layers, their weights, and the sizes of all buffers that they compute on.

    Parameters
    ----------
    layers : sequence of Layer
        A contiguous range of the model.
    parameters : Parameters
        The weights of exactly these layers.
    batch, context, width : int
        Samples per microbatch, tokens per sample, size of the residual stream.
    recompute : bool
        Keep only the residual streams and compute the rest again in the backward.
    team : Team
        The threads that share its products.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        parameters: Parameters,
        batch: int,
        context: int,
        width: int,
        recompute: bool = False,
        team: Team = ALONE,
    ) -> None:
        self.layers = tuple(layers)
        self.batch = batch
        self.stream_shape = (batch * context, width)
        self.recompute = recompute
        self._team = team
        self._weights = [parameters.weights_of(layer) for layer in layers]
        self._scratch = _shared([layer.scratch_shapes(batch, team.num_threads) for layer in layers])
        self._shared_stashes = self._layer_stashes() if recompute else None
        self._unused = np.empty(self.stream_shape, np.float32)

    def new_stream(self) -> np.ndarray:
        """Return a new residual stream, as it crosses a stage boundary: float32 (batch * context, width)."""
        return np.zeros(self.stream_shape, np.float32)

    def new_stash(self) -> Stash:
        """Return a new stash for one microbatch."""
        streams = [self.new_stream() for _ in self.layers[1:]]
        return Stash(streams, self._shared_stashes or self._layer_stashes())

    def new_upstream(self) -> list[Arrays]:
        """Return what the input gradient leaves for the weight gradient, of all layers, for one microbatch."""
        return [new_arrays(layer.upstream_shapes(self.batch)) for layer in self.layers]

    def new_shared_upstream(self) -> list[Arrays]:
        """Return the same for schedules whose B does both halves layer by layer: each layer reuses the memory."""
        return _shared([layer.upstream_shapes(self.batch) for layer in self.layers])

    def forward(self, microbatch: Microbatch, x: np.ndarray, out: np.ndarray, stash: Stash, poll: Poll) -> None:
        """Run all layers; `x` is not read by a stage with the embedding, `out` not written by one with the head."""
        streams = [x, *stash.streams, out]
        for index, layer in enumerate(self.layers):
            buffers = Buffers(stash.layers[index], {}, self._scratch[index], self._team)
            layer.forward(self._weights[index], microbatch, streams[index], streams[index + 1], buffers, poll)

    def backward(
        self,
        microbatch: Microbatch,
        x: np.ndarray,
        d: np.ndarray,
        stash: Stash,
        upstream: list[Arrays],
        gradients: Sequence[Arrays],
        poll: Poll,
    ) -> None:
        """Run both halves of the backward, layer by layer; `d` becomes the gradient of `x` in place."""
        for index in reversed(range(len(self.layers))):
            self._input_half(index, microbatch, x, d, stash, upstream, poll)
            self._weight_half(index, microbatch, x, stash, upstream, gradients, poll)

    def backward_input(
        self, microbatch: Microbatch, x: np.ndarray, d: np.ndarray, stash: Stash, upstream: list[Arrays], poll: Poll
    ) -> None:
        """Run only the input half; `upstream` must live until the weight half."""
        for index in reversed(range(len(self.layers))):
            self._input_half(index, microbatch, x, d, stash, upstream, poll)

    def backward_weight(
        self,
        microbatch: Microbatch,
        x: np.ndarray,
        stash: Stash,
        upstream: list[Arrays],
        gradients: Sequence[Arrays],
        poll: Poll,
    ) -> None:
        """Run the weight half that `backward_input` left."""
        for index in reversed(range(len(self.layers))):
            if self.recompute:
                self._forward_again(index, microbatch, x, stash, poll)
            self._weight_half(index, microbatch, x, stash, upstream, gradients, poll)

    def _input_half(
        self,
        index: int,
        microbatch: Microbatch,
        x: np.ndarray,
        d: np.ndarray,
        stash: Stash,
        upstream: list[Arrays],
        poll: Poll,
    ) -> None:
        if self.recompute:
            self._forward_again(index, microbatch, x, stash, poll)
        buffers = Buffers(stash.layers[index], upstream[index], self._scratch[index], self._team)
        x = stash.streams[index - 1] if index else x
        self.layers[index].backward_input(self._weights[index], microbatch, x, d, buffers, poll)

    def _weight_half(
        self,
        index: int,
        microbatch: Microbatch,
        x: np.ndarray,
        stash: Stash,
        upstream: list[Arrays],
        gradients: Sequence[Arrays],
        poll: Poll,
    ) -> None:
        buffers = Buffers(stash.layers[index], upstream[index], self._scratch[index], self._team)
        x = stash.streams[index - 1] if index else x
        self.layers[index].backward_weight(gradients[index], microbatch, x, buffers, poll)

    def _forward_again(self, index: int, microbatch: Microbatch, x: np.ndarray, stash: Stash, poll: Poll) -> None:
        buffers = Buffers(stash.layers[index], {}, self._scratch[index], self._team)
        x = stash.streams[index - 1] if index else x
        self.layers[index].forward(self._weights[index], microbatch, x, self._unused, buffers, poll)

    def _layer_stashes(self) -> list[Arrays]:
        return [new_arrays(layer.stash_shapes(self.batch)) for layer in self.layers]


def _shared(shapes: Sequence[BufferShapes]) -> list[Arrays]:
    """Return the buffers of layers that use them one after the other: those with one dtype and slack share memory.

    What is read after the end of a bfloat16 buffer then never holds the bits of anything else.
    """
    shared: list[dict[str, np.ndarray]] = [{} for _ in shapes]
    for has_slack in (False, True):
        chosen = [
            {name: spec for name, spec in layer.items() if (spec.slack_bytes > 0) is has_slack} for layer in shapes
        ]
        block = new_block(max(map(bytes_of, chosen), default=0))
        for arrays, specs in zip(shared, chosen, strict=True):
            arrays |= cut_block(block, specs)
    return [*shared]
