"""Which samples a microbatch holds: a function of the step and the microbatch's place in the global batch."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from hpcpipe.data.windows import HeldOut
from hpcpipe.memory.layout import new_arrays
from hpcpipe.model.layer import Microbatch
from hpcpipe.model.tensors import BufferSpec, f32, i32


def empty_microbatch(batch: int, context: int) -> Microbatch:
    """Return a microbatch without targets."""
    return Microbatch(
        tokens=np.zeros((batch, context), np.int32),
        targets=np.full((batch, context), -1, np.int32),
        coefficients=np.zeros((batch, context), np.float32),
    )


def batch_specs(batch: int, context: int) -> dict[str, BufferSpec]:
    """Return the buffers of one microbatch of `TrainingBatches`."""
    return {"tokens": i32(batch, context), "targets": i32(batch, context), "coefficients": f32(batch, context)}


class Samples(Protocol):
    """What training reads, such as `hpcpipe.data.windows.Samples`."""

    def batch(self, first: int, count: int, tokens: np.ndarray, targets: np.ndarray, /) -> None:
        """Write samples, numbered from the start of the training, into the caller's int32 arrays."""
        ...


class TrainingBatches:
    """The microbatches of one step of one replica, in buffers that every step fills again.

    Parameters
    ----------
    samples : Samples
        The training samples in their order.
    num_microbatches : int
        Microbatches per step over all replicas.
    local : range
        This replica's part of them.
    batch, context : int
        Samples per microbatch and tokens per sample.
    """

    def __init__(self, samples: Samples, num_microbatches: int, local: range, batch: int, context: int) -> None:
        self._samples = samples
        self._num_microbatches = num_microbatches
        self._local = local
        self._batch = batch
        self._microbatches = []
        for _ in local:
            arrays = new_arrays(batch_specs(batch, context), "batches")
            arrays["coefficients"].fill(1.0)
            self._microbatches.append(Microbatch(arrays["tokens"], arrays["targets"], arrays["coefficients"]))

    def load(self, step: int) -> None:
        """Read the samples of a step, counted from 1."""
        for index, microbatch in zip(self._local, self._microbatches, strict=True):
            first = ((step - 1) * self._num_microbatches + index) * self._batch
            self._samples.batch(first, self._batch, microbatch.tokens, microbatch.targets)

    def __getitem__(self, index: int) -> Microbatch:
        return self._microbatches[index]


def held_out_loader(held_out: HeldOut, first: int, batch: int, context: int) -> Callable[[int], Microbatch]:
    """Return a function that reads held-out microbatch `first` + index; behind the last sample it has no targets."""

    def load(index: int) -> Microbatch:
        microbatch = empty_microbatch(batch, context)
        start = (first + index) * batch
        held_out.batch(start, batch, microbatch.tokens, microbatch.targets, microbatch.coefficients)
        return microbatch

    return load
