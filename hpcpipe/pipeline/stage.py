"""A stage: a contiguous range of layers that computes forward and both halves of the backward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcpipe.kernels.threads import ALONE, Team
from hpcpipe.memory.layout import Memory, new_arrays, new_memory
from hpcpipe.model.layer import Arrays, Buffers, Layer, Microbatch, Poll
from hpcpipe.model.tensors import f32
from hpcpipe.pipeline.buffers import StageLayout, StageShape, Working
from hpcpipe.pipeline.parameters import Parameters

_MEMORY = "activations"


@dataclass
class Stash:
    """What the forward of one microbatch leaves for its backward.

    Attributes
    ----------
    streams : list of ndarray
        The residual stream between the layers of the stage, one less than there are layers.
    layers : list of mapping
        Each layer's stash; what is computed again in the backward is the same memory for all microbatches.
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
    recompute : str
        ``none``: keep everything; ``selective``: compute again in the backward what layers call cheap; ``full``: keep
        only the residual streams.
    team : Team
        The threads that share its products.

    Attributes
    ----------
    shape : StageShape
        What decides how much memory it computes on.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        parameters: Parameters,
        batch: int,
        context: int,
        width: int,
        recompute: str = "none",
        team: Team = ALONE,
    ) -> None:
        self.layers = tuple(layers)
        self.shape = StageShape(self.layers, batch, (batch * context, width), recompute, team.num_threads)
        self._team = team
        self._weights = [parameters.weights_of(layer) for layer in layers]
        self._repeats_forward, self._repeats_cheap = recompute == "full", recompute == "selective"
        self._bound: tuple[StageLayout, Working] | None = None

    def bind(self, layout: StageLayout, memory: Memory) -> None:
        """Compute on planned memory; without this the stage makes what it needs, for any schedule with a backward.

        Parameters
        ----------
        layout : StageLayout
            Of this stage's shape.
        memory : Memory
            The caller's: holds ``working_extent``, and is this stage's only while an action runs.
        """
        self._bound = layout, layout.cut_working(memory)

    def stash_in(self, memory: Memory) -> Stash:
        """Return the stash of one microbatch in the caller's memory, which holds the layout's ``kept_extent``."""
        layout, working = self._binding
        return Stash(*layout.cut_kept(memory, working))

    def upstream_in(self, memory: Memory) -> list[Arrays]:
        """Return what the input gradient leaves for the weight gradient, of each layer, for one microbatch.

        It lies in the caller's memory, which holds the layout's ``upstream_extent``.
        """
        return self._binding[0].cut_upstream(memory)

    def shared_upstream(self) -> list[Arrays]:
        """Return the same for `backward`, which does both halves layer by layer: each layer uses the same memory."""
        return self._working.upstream

    def new_stream(self) -> np.ndarray:
        """Return a residual stream of its own, as it crosses a stage boundary: float32 (batch * context, width)."""
        return new_arrays({"stream": f32(*self.shape.stream_shape)}, _MEMORY)["stream"]

    def new_stash(self) -> Stash:
        """Return a stash for one microbatch, in memory of its own."""
        return self.stash_in(new_memory(self._binding[0].kept_extent, _MEMORY))

    def new_upstream(self) -> list[Arrays]:
        """Return what `upstream_in` does, in memory of its own."""
        return self.upstream_in(new_memory(self._binding[0].upstream_extent, _MEMORY))

    @property
    def _working(self) -> Working:
        return self._binding[1]

    @property
    def _binding(self) -> tuple[StageLayout, Working]:
        if self._bound is None:
            layout = StageLayout(self.shape, is_forward_only=False, has_whole_backward=True)
            self.bind(layout, new_memory(layout.working_extent, _MEMORY))
        assert self._bound is not None
        return self._bound

    def forward(self, microbatch: Microbatch, x: np.ndarray, out: np.ndarray, stash: Stash, poll: Poll) -> None:
        """Run all layers; `x` is not read by a stage with the embedding, `out` not written by one with the head."""
        streams = [x, *stash.streams, out]
        for index, layer in enumerate(self.layers):
            buffers = Buffers(stash.layers[index], {}, self._working.scratch[index], self._team)
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
            if self._repeats_forward:
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
        if self._repeats_forward:
            self._forward_again(index, microbatch, x, stash, poll)
        buffers = Buffers(stash.layers[index], upstream[index], self._working.scratch[index], self._team)
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
        buffers = Buffers(stash.layers[index], upstream[index], self._working.scratch[index], self._team)
        x, layer = stash.streams[index - 1] if index else x, self.layers[index]
        if self._repeats_cheap and layer.cheap:
            layer.recompute(self._weights[index], x, buffers, poll)
        layer.backward_weight(gradients[index], microbatch, x, buffers, poll)

    def _forward_again(self, index: int, microbatch: Microbatch, x: np.ndarray, stash: Stash, poll: Poll) -> None:
        buffers = Buffers(stash.layers[index], {}, self._working.scratch[index], self._team)
        x = stash.streams[index - 1] if index else x
        self.layers[index].forward(self._weights[index], microbatch, x, self._working.streams[0], buffers, poll)
