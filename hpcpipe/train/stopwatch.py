"""Layers with a stopwatch: what each of their functions takes while a stage runs them."""

import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from hpcpipe.model.layer import Layer

_KEPT = 4096
_TRIMMED = 20


class TimedLayer:
    """A layer that keeps how much processor time its last calls took; otherwise it is the layer.

    Processor time leaves out what other programs take from the core. The two clock readings cost less than a
    microsecond.

    Parameters
    ----------
    layer : Layer
        What runs.

    Attributes
    ----------
    taken : dict of str to deque of float
        Seconds of the last 4096 calls of ``forward``, ``backward_input``, ``backward_weight`` and ``recompute``.
    """

    def __init__(self, layer: Layer) -> None:
        self.prefix, self.tensors, self.packed, self.cheap = layer.prefix, layer.tensors, layer.packed, layer.cheap
        self.stash_shapes, self.upstream_shapes = layer.stash_shapes, layer.upstream_shapes
        self.scratch_shapes, self.forward_flops = layer.scratch_shapes, layer.forward_flops
        self.taken: dict[str, deque[float]] = {}
        self.forward = self._timed("forward", layer.forward)
        self.backward_input = self._timed("backward_input", layer.backward_input)
        self.backward_weight = self._timed("backward_weight", layer.backward_weight)
        self.recompute = self._timed("recompute", layer.recompute)

    def forget(self) -> None:
        """Drop what has been timed so far."""
        for taken in self.taken.values():
            taken.clear()

    def mean_s(self, part: str) -> float:
        """Return the mean of the kept calls of a function without the extremes, not a number if there are none."""
        return trimmed_mean(self.taken[part]) if self.taken[part] else float("nan")

    def _timed(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        keep = self.taken.setdefault(name, deque(maxlen=_KEPT)).append
        clock = time.thread_time

        def run(*arguments: Any) -> None:
            start = clock()
            function(*arguments)
            keep(clock() - start)

        return run


def trimmed_mean(values: Collection[float]) -> float:
    """Return the mean of at least one value without the lowest and highest twentieth.

    Times lean to the slow side, and a pipeline waits for their sum: a median would be too small, and a mean would
    count a moment in which the machine did something else.
    """
    ordered = np.sort(np.fromiter(values, np.float64, len(values)))
    cut = len(ordered) // _TRIMMED
    return float(ordered[cut : len(ordered) - cut].mean())
