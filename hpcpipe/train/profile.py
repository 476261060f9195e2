"""What each layer of a model takes on this processor: a few rounds of every kind of layer, timed."""

import time
from collections.abc import Callable
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

_LEAST_ROUNDS = 5
_MOST_ROUNDS = 200
_LEAST_S = 0.4
_IN_TURN = 3
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

    Several microbatches go forward before they go backward, as in a pipeline, so that what a backward reads has left
    the caches as it will have then. The medians over the rounds are in processor time: what other programs take does
    not count. It runs for about half a second, or for a few rounds where layers are large.

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
    timed = [_TimedLayer(config, layer) for layer in (layers[0], layers[1], layers[-1])]
    generator = np.random.default_rng(config.run.seed)
    microbatches = [_random_microbatch(config, generator) for _ in range(_IN_TURN)]
    start = time.perf_counter()
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _LEAST_ROUNDS and time.perf_counter() - start > _LEAST_S:
            break
        for index, microbatch in enumerate(microbatches):
            for layer in timed:
                layer.forward(index, microbatch)
        for index, microbatch in enumerate(microbatches):
            for layer in reversed(timed):
                layer.backward(index, microbatch)
        for layer in timed:
            layer.update()
    return [layer.costs() for layer in timed]


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
        self._taken: dict[str, list[float]] = {field.name: [] for field in fields(LayerCosts)}

    def _random_stream(self, generator: np.random.Generator) -> np.ndarray:
        return generator.normal(0, _STREAM_STD, self._stage.stream_shape).astype(np.float32)

    def forward(self, index: int, microbatch: Microbatch) -> None:
        self._time(
            "forward",
            lambda: self._stage.forward(microbatch, self._x[index], self._out, self._stashes[index], _no_poll),
        )

    def backward(self, index: int, microbatch: Microbatch) -> None:
        stage, x, stash = self._stage, self._x[index], self._stashes[index]
        np.copyto(self._working, self._d)
        self._time(
            "backward_input",
            lambda: stage.backward_input(microbatch, x, self._working, stash, self._upstream, _no_poll),
        )
        self._time(
            "backward_weight",
            lambda: stage.backward_weight(microbatch, x, stash, self._upstream, self._of_layer, _no_poll),
        )
        np.copyto(self._working, self._d)
        self._time(
            "backward",
            lambda: stage.backward(microbatch, x, self._working, stash, self._shared, self._of_layer, _no_poll),
        )

    def update(self) -> None:
        self._time("update", self._update)

    def _update(self) -> None:
        sum_of_squares(self._gradients.flat)
        # A learning rate of zero leaves the weights as they are, for the same work.
        self._optimizer.update(self._weights.arrays, self._gradients.arrays, 1, 1.0, 0.0)
        self._gradients.flat.fill(0.0)

    def costs(self) -> LayerCosts:
        return LayerCosts(*(float(np.median(taken)) for taken in self._taken.values()))

    def _time(self, name: str, call: Callable[[], None]) -> None:
        start = time.thread_time()
        call()
        self._taken[name].append(time.thread_time() - start)


def _random_microbatch(config: Config, generator: np.random.Generator) -> Microbatch:
    shape = (config.parallel.microbatch_size, config.model.context)
    tokens, targets = generator.integers(0, config.model.vocab, (2, *shape)).astype(np.int32)
    return Microbatch(tokens, targets, np.ones(shape, np.float32))


def _no_poll() -> None:
    """Nothing moves while layers are timed."""
