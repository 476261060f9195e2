"""What each layer of a model takes on this processor: a few rounds of every kind of layer, timed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from hpcpipe.config.schema import Config
from hpcpipe.kernels.reduce import sum_of_squares
from hpcpipe.memory.arena import Arena
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.initial import fill_initial
from hpcpipe.model.layer import Layer, Microbatch
from hpcpipe.optim.adamw import MOMENTS, AdamW
from hpcpipe.pipeline.parameters import Parameters
from hpcpipe.pipeline.stage import Stage

_LEAST_ROUNDS = 4
_MOST_ROUNDS = 200
_LEAST_S = 0.8
_IN_TURN = 2
_STASH_BYTES = 64 << 20
_STREAM_STD = 0.5


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of processor time that one layer takes for one microbatch; `update` is once per step.

    Attributes
    ----------
    forward, backward_input, backward_weight : float
        The three functions, each as an action of its own.
    backward : float
        Both halves of the backward in one action: less than their sum where activations are recomputed.
    update : float
        Zeroing gradients, their norm, and the optimizer, over all of the layer's parameters.
    """

    forward: float
    backward_input: float
    backward_weight: float
    backward: float
    update: float


def profile_layers(config: Config) -> list[LayerCosts]:
    """Time the embedding, a block and the head as a stage runs them.

    As in a pipeline, some microbatches go forward through as many blocks as a rank has before they go backward, so that
    what a backward reads has left the caches as it will have then; beyond 64 MiB of stash more blocks make no
    difference. The medians over the rounds are in processor time: what other programs take does not count. It runs for
    about a second, or for four rounds where layers are large.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.

    Returns
    -------
    list of LayerCosts
        Of the embedding, of a block, and of the head.
    """
    layers = build_layers(config.model)
    embedding, head = _TimedLayer(config, layers[0]), _TimedLayer(config, layers[-1])
    blocks = [_TimedLayer(config, layers[1])]
    num_blocks = min(-(-config.model.layers // config.parallel.pipeline), -(-_STASH_BYTES // blocks[0].stash_bytes))
    blocks += [_TimedLayer(config, layer) for layer in layers[2 : 1 + num_blocks]]
    timed = [embedding, *blocks, head]
    generator = np.random.default_rng(config.run.seed)
    microbatches = [_random_microbatch(config, generator) for _ in range(_IN_TURN)]
    start = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - start > _LEAST_S:
            break
        for index, microbatch in enumerate(microbatches):
            for layer in timed:
                layer.forward(index, microbatch)
        for index, microbatch in enumerate(microbatches):
            for layer in reversed(timed):
                # The second of two backwards would find in the caches what the first has read.
                (layer.backward if number % 2 else layer.backward_in_halves)(index, microbatch)
        for layer in timed:
            layer.update()
    return [_median_costs(kind) for kind in ([embedding], blocks, [head])]


def _median_costs(timed: Sequence["_TimedLayer"]) -> LayerCosts:
    """Return the medians of what all layers of one kind took."""
    taken = [[time for layer in timed for time in layer.taken[field.name]] for field in fields(LayerCosts)]
    return LayerCosts(*(float(np.median(times)) for times in taken))


class _TimedLayer:
    """A stage of one layer with a stopwatch."""

    def __init__(self, config: Config, layer: Layer) -> None:
        model, parallel = config.model, config.parallel
        parameters = Parameters((layer,))
        for tensor in parameters.layout.stored:
            fill_initial(tensor, config.run.seed, parameters.weights.arrays[tensor.name])
        recompute = config.train.recompute == "full"
        stage = self._stage = Stage(
            (layer,), parameters, parallel.microbatch_size, model.context, model.width, recompute
        )
        generator = np.random.default_rng(1)
        self._x = [self._random_stream(generator) for _ in range(_IN_TURN)]
        self._d = self._random_stream(generator)
        self._out, self._working = stage.new_stream(), stage.new_stream()
        self._stashes = [stage.new_stash() for _ in range(_IN_TURN)]
        self._upstream, self._shared = stage.new_upstream(), stage.new_shared_upstream()
        self._weights, self._gradients = parameters.weights, parameters.new_gradients()
        self._of_layer = [
            {tensor.name.removeprefix(layer.prefix): self._gradients.arrays[tensor.name] for tensor in layer.tensors}
        ]
        stored = parameters.layout.stored
        moments = {moment: Arena({tensor.name: tensor.shape for tensor in stored}).arrays for moment in MOMENTS}
        self._optimizer = AdamW(stored, moments, config.train)
        self.stash_bytes = _IN_TURN * sum(array.nbytes for array in self._stashes[0].layers[0].values()) or 1
        self.taken: dict[str, list[float]] = {field.name: [] for field in fields(LayerCosts)}

    def _random_stream(self, generator: np.random.Generator) -> np.ndarray:
        return generator.normal(0, _STREAM_STD, self._stage.stream_shape).astype(np.float32)

    def forward(self, index: int, microbatch: Microbatch) -> None:
        self._time(
            "forward",
            lambda: self._stage.forward(microbatch, self._x[index], self._out, self._stashes[index], _no_poll),
        )

    def backward(self, index: int, microbatch: Microbatch) -> None:
        stage, x, stash, d = self._stage, self._x[index], self._stashes[index], self._fresh_gradient()
        self._time(
            "backward",
            lambda: stage.backward(microbatch, x, d, stash, self._shared, self._of_layer, _no_poll),
        )

    def backward_in_halves(self, index: int, microbatch: Microbatch) -> None:
        stage, x, stash, d = self._stage, self._x[index], self._stashes[index], self._fresh_gradient()
        self._time(
            "backward_input",
            lambda: stage.backward_input(microbatch, x, d, stash, self._upstream, _no_poll),
        )
        self._time(
            "backward_weight",
            lambda: stage.backward_weight(microbatch, x, stash, self._upstream, self._of_layer, _no_poll),
        )

    def _fresh_gradient(self) -> np.ndarray:
        np.copyto(self._working, self._d)
        return self._working

    def update(self) -> None:
        self._time("update", self._update)

    def _update(self) -> None:
        sum_of_squares(self._gradients.flat)
        # A learning rate of zero leaves the weights as they are, for the same work.
        self._optimizer.update(self._weights.arrays, self._gradients.arrays, 1, 1.0, 0.0)
        self._gradients.flat.fill(0.0)

    def _time(self, name: str, call: Callable[[], None]) -> None:
        start = time.thread_time()
        call()
        self.taken[name].append(time.thread_time() - start)


def _random_microbatch(config: Config, generator: np.random.Generator) -> Microbatch:
    shape = (config.parallel.microbatch_size, config.model.context)
    tokens, targets = generator.integers(0, config.model.vocab, (2, *shape)).astype(np.int32)
    return Microbatch(tokens, targets, np.ones(shape, np.float32))


def _no_poll() -> None:
    """Nothing moves while layers are timed."""
