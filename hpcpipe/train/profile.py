"""What each layer of a model takes on this processor: a few rounds of every kind of layer, timed."""

import time
from dataclasses import dataclass, fields, replace

import numpy as np

from hpcpipe.config.schema import Config
from hpcpipe.kernels.reduce import sum_of_squares
from hpcpipe.kernels.threads import ALONE, Team
from hpcpipe.memory.arena import Arena
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.initial import fill_initial
from hpcpipe.model.layer import Microbatch
from hpcpipe.optim.adamw import MOMENTS, AdamW
from hpcpipe.pipeline.parameters import Parameters
from hpcpipe.pipeline.stage import Stage
from hpcpipe.train.stopwatch import TimedLayer, trimmed_mean

_WARMUP_ROUNDS = 2
_LEAST_ROUNDS = 4
_MOST_ROUNDS = 32
_ENOUGH_S = 1.5
_IN_TURN = 2
_STASH_BYTES = 64 << 20
_AGAIN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "selective": ((), ("recompute",)),
    "full": (("forward",), ("forward",)),
}
"""What the two halves of a backward compute again before they begin, by ``train.recompute``."""


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


def profile_layers(config: Config, team: Team = ALONE) -> list[LayerCosts]:
    """Time the embedding, blocks and the head as a stage runs them.

    As in a pipeline, some microbatches go forward through as many blocks as a rank has before they go backward, so that
    what a backward reads has left the caches as it will have then; beyond 64 MiB of stash more blocks make no
    difference. The means over the rounds are in processor time: what other programs take does not count. It runs for
    at most 1.5 s, or for six rounds where layers are large.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.
    team : Team
        The threads of the rank.

    Returns
    -------
    list of LayerCosts
        Of the embedding, of a block, and of the head.
    """
    profiled = _ProfiledStage(config, team)
    for number in range(_WARMUP_ROUNDS):
        profiled.round(in_halves=number % 2 == 0)
    # What touches memory for the first time is no measure of what comes later.
    profiled.forget()
    start = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - start > _ENOUGH_S:
            break
        profiled.round(in_halves=number % 2 == 0)
    return profiled.costs()


class _ProfiledStage:
    """A stage with all kinds of layers, and what it needs to run."""

    def __init__(self, config: Config, team: Team) -> None:
        parallel = config.parallel
        self._team = team
        # In a pipeline the first and the last rank update a tied table each.
        model = replace(config.model, tied=config.model.tied and parallel.pipeline == 1)
        embedding, *blocks, head = build_layers(model, config.train.precision)
        stash = sum(spec.num_bytes for spec in blocks[0].stash_shapes(parallel.microbatch_size).values())
        num_blocks = min(-(-model.layers // parallel.pipeline), -(-_STASH_BYTES // (_IN_TURN * stash)))
        layers = [TimedLayer(layer) for layer in (embedding, *blocks[:num_blocks], head)]
        self._layers = layers
        self._samples: list[dict[str, list[float]]] = [{f.name: [] for f in fields(LayerCosts)} for _ in layers]
        parameters = self._parameters = Parameters(layers)
        for tensor in parameters.layout.stored:
            fill_initial(tensor, config.run.seed, parameters.weights.arrays[tensor.name])
        parameters.packed.pack(team)
        recompute = config.train.recompute
        self._again_input, self._again_weight = _AGAIN[recompute]
        size = parallel.microbatch_size, model.context
        stage = self._stage = Stage(layers, parameters, *size, model.width, recompute, team)
        self._x, self._d = stage.new_stream(), stage.new_stream()
        self._stashes = [stage.new_stash() for _ in range(_IN_TURN)]
        self._upstream, self._shared = stage.new_upstream(), stage.shared_upstream()
        self._gradients = parameters.new_gradients()
        self._of_layers = [
            {tensor.name.removeprefix(layer.prefix): self._gradients.arrays[tensor.name] for tensor in layer.tensors}
            for layer in layers
        ]
        stored = parameters.layout.stored
        moments = {moment: Arena({tensor.name: tensor.shape for tensor in stored}).arrays for moment in MOMENTS}
        self._optimizers = {
            layer.prefix: AdamW([tensor for tensor in stored if tensor in layer.tensors], moments, config.train)
            for layer in layers
        }
        generator = np.random.default_rng(config.run.seed)
        self._microbatches = [_random_microbatch(size, model.vocab, generator) for _ in range(_IN_TURN)]

    def round(self, in_halves: bool) -> None:
        """Run all microbatches forward, then backward, either way, and update once."""
        stage, x, d = self._stage, self._x, self._d
        for layer in self._layers:
            layer.forget()
        for microbatch, stash in zip(self._microbatches, self._stashes, strict=True):
            stage.forward(microbatch, x, d, stash, _no_poll)
        self._keep("forward", "forward")
        for microbatch, stash in zip(self._microbatches, self._stashes, strict=True):
            if in_halves:
                stage.backward_input(microbatch, x, d, stash, self._upstream, _no_poll)
                self._keep("backward_input", "backward_input", *self._again_input)
                stage.backward_weight(microbatch, x, stash, self._upstream, self._of_layers, _no_poll)
                self._keep("backward_weight", "backward_weight", *self._again_weight)
            else:
                stage.backward(microbatch, x, d, stash, self._shared, self._of_layers, _no_poll)
                # What is computed again for the input half serves the weight half too.
                self._keep("backward", "backward_input", "backward_weight", *self._again_weight)
        for layer, samples in zip(self._layers, self._samples, strict=True):
            start = time.thread_time()
            self._update(layer)
            samples["update"].append(time.thread_time() - start)

    def forget(self) -> None:
        """Drop what has been timed so far."""
        for samples in self._samples:
            for taken in samples.values():
                taken.clear()

    def costs(self) -> list[LayerCosts]:
        """Return the means of all layers of each kind, without the extremes."""
        kinds = ([self._samples[0]], self._samples[1:-1], [self._samples[-1]])
        return [
            LayerCosts(
                *(
                    trimmed_mean([taken for samples in kind for taken in samples[field.name]])
                    for field in fields(LayerCosts)
                )
            )
            for kind in kinds
        ]

    def _keep(self, part: str, *functions: str) -> None:
        """Take one sample of a part from each layer: the time of the functions that it called."""
        for layer, samples in zip(self._layers, self._samples, strict=True):
            # A layer with nothing to compute again is not asked to.
            called = [taken for name in functions if (taken := layer.taken[name])]
            samples[part].append(sum(sum(taken) / len(taken) for taken in called))
            layer.forget()

    def _update(self, layer: TimedLayer) -> None:
        gradients = self._gradients.arrays
        for tensor in layer.tensors:
            sum_of_squares(gradients[tensor.name].reshape(-1))
        # A learning rate of zero leaves the weights as they are, for the same work.
        weights, packed = self._parameters.weights.arrays, self._parameters.packed
        panels = {tensor.name: packed.of(tensor.name) for tensor in layer.tensors if tensor.name in packed}
        self._optimizers[layer.prefix].update(weights, gradients, 1, 1.0, 0.0, panels, self._team)
        for tensor in layer.tensors:
            gradients[tensor.name].fill(0.0)


def _random_microbatch(size: tuple[int, int], vocab: int, generator: np.random.Generator) -> Microbatch:
    tokens, targets = generator.integers(0, vocab, (2, *size)).astype(np.int32)
    return Microbatch(tokens, targets, np.ones(size, np.float32))


def _no_poll() -> None:
    """Nothing moves while layers are timed."""
