"""Where the buffers of a rank's stages lie: planned from the rank's list of actions, before there is any memory."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from hpcpipe.memory.layout import NOTHING, Extent, Layout, Memory, largest
from hpcpipe.memory.place import Life, most_at_once, place
from hpcpipe.model.layer import Arrays, Layer
from hpcpipe.model.tensors import BufferShapes, BufferSpec, f32
from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.buffers import count_buffers

Key = tuple[int, int]
"""A stage and a microbatch."""


@dataclass(frozen=True)
class StageShape:
    """What decides how much memory a stage computes on.

    Attributes
    ----------
    layers : tuple of Layer
        Its layers.
    batch : int
        Samples per microbatch.
    stream_shape : (int, int)
        Of the residual stream.
    recompute : str
        What the backward computes again: ``none``, ``selective`` (what layers call cheap) or ``full`` (everything but
        the residual streams between layers).
    num_threads : int
        Threads that share its products.
    """

    layers: tuple[Layer, ...]
    batch: int
    stream_shape: tuple[int, int]
    recompute: str = "none"
    num_threads: int = 1

    def kept(self, layer: Layer, stash: Collection[str]) -> list[str]:
        """Return what a microbatch keeps, of the names in a layer's stash, until its backward."""
        if self.recompute == "full":
            return []
        return [name for name in stash if self.recompute == "none" or name not in layer.cheap]


@dataclass(frozen=True)
class Working:
    """What a stage needs during one action, and leaves to nobody.

    Attributes
    ----------
    streams : list of ndarray
        Residual streams: those between layers where nothing follows a forward, or one that a repeated forward writes.
    scratch, stash, upstream : list of mapping
        Of each layer; `stash` is what no microbatch keeps, `upstream` is empty where no action does a whole backward.
    """

    streams: list[np.ndarray]
    scratch: list[Arrays]
    stash: list[Arrays]
    upstream: list[Arrays]


class StageLayout:
    """The layouts of a stage's buffers.

    Three kinds of memory: what one microbatch keeps from its forward to the end of its backward, what it keeps from I
    to W, and working memory for one action: scratch, activations that are computed again or that a forward-only
    schedule needs no longer, and what one half of a whole backward leaves for the other. Layers use working memory one
    after the other, so they share it.

    Parameters
    ----------
    shape : StageShape
        The stage.
    is_forward_only : bool
        Whether no backward follows.
    has_whole_backward : bool
        Whether one action does both halves of a backward.

    Attributes
    ----------
    kept_extent, upstream_extent, working_extent : Extent
        What the three take.
    """

    def __init__(self, shape: StageShape, is_forward_only: bool, has_whole_backward: bool) -> None:
        self._stash, self._upstream, self._working = [], [], []
        for layer in shape.layers:
            stash, upstream = layer.stash_shapes(shape.batch), layer.upstream_shapes(shape.batch)
            kept = () if is_forward_only else shape.kept(layer, stash)
            self._stash.append(_stacked({name: stash[name] for name in kept}))
            self._upstream.append(_stacked({} if is_forward_only else upstream))
            parts = {
                "scratch": layer.scratch_shapes(shape.batch, shape.num_threads),
                "stash": {name: spec for name, spec in stash.items() if name not in kept},
                "upstream": upstream if has_whole_backward else {},
            }
            self._working.append(_in_turn(parts))
        num_between = max(0, len(shape.layers) - 1)
        # A forward that nothing follows has one layer's input and output at a time.
        num_working = min(2, num_between) if is_forward_only else int(shape.recompute == "full")
        self._num_between = num_between
        self._kept_streams = _streams(shape, 0 if is_forward_only else num_between)
        self._working_streams = _streams(shape, num_working)
        self._stash_at = _running(self._kept_streams.extent, self._stash)
        self._upstream_at = _running(NOTHING, self._upstream)
        self.kept_extent, self.upstream_extent = self._stash_at[-1], self._upstream_at[-1]
        self.working_extent = self._working_streams.extent.after(largest(layout.extent for layout in self._working))

    def cut_kept(self, memory: Memory, working: Working) -> tuple[list[np.ndarray], list[Arrays]]:
        """Return the streams between layers and each layer's stash of a microbatch.

        Parameters
        ----------
        memory : Memory
            Holds `kept_extent`.
        working : Working
            Gives what the microbatch does not keep.
        """
        streams = [*self._kept_streams.cut(memory).values()] or [
            working.streams[place % 2] for place in range(self._num_between)
        ]
        kept = [layout.cut(memory.at(start)) for layout, start in zip(self._stash, self._stash_at, strict=False)]
        return streams, [{**own, **shared} for own, shared in zip(kept, working.stash, strict=True)]

    def cut_upstream(self, memory: Memory) -> list[Arrays]:
        """Return what I leaves for W, of each layer; `memory` holds `upstream_extent`."""
        return [layout.cut(memory.at(start)) for layout, start in zip(self._upstream, self._upstream_at, strict=False)]

    def cut_working(self, memory: Memory) -> Working:
        """Return the working memory; `memory` holds `working_extent`."""
        streams = [*self._working_streams.cut(memory).values()]
        parts: dict[str, list[Arrays]] = {"scratch": [], "stash": [], "upstream": []}
        for layout in self._working:
            arrays = layout.cut(memory.at(self._working_streams.extent))
            for kind, layers in parts.items():
                layers.append({name: array for (of, name), array in arrays.items() if of == kind})
        return Working(streams, **parts)


class RankLayout:
    """Where everything lies that an executor's stages compute on.

    Parameters
    ----------
    schedule : Schedule
        Lowered and checked.
    rank : int
        The rank's place in the pipeline.
    shapes : mapping of int to StageShape
        Its stages.

    Attributes
    ----------
    stages : dict of int to StageLayout
        The layouts of each stage.
    streams : Layout
        Of the residual streams that are inputs, outputs or gradients of stages, or messages, at the beginning.
    working_at : Extent
        Where the working memory begins, which all stages share.
    """

    def __init__(self, schedule: Schedule, rank: int, shapes: Mapping[int, StageShape]) -> None:
        actions = schedule.actions[rank]
        is_forward_only = schedule.is_forward_only
        whole = {action.stage for action in actions if action.kind is Kind.B}
        self.stages = {index: StageLayout(shape, is_forward_only, index in whole) for index, shape in shapes.items()}
        shape = next(iter(shapes.values()))
        # Inputs, outputs and gradients have one shape, so a stage's output can become the next one's input as it is.
        self.streams = _streams(shape, count_buffers(schedule, rank).streams)
        self.working_at = self.streams.extent
        working = largest(stage.working_extent for stage in self.stages.values())
        self._kept_at = self.working_at.after(working)
        self._lives = _lives(schedule, rank)

    def place(self) -> tuple[dict[tuple[Key, bool], Extent], Extent]:
        """Return where the memory of each (stage, microbatch) begins, and what everything takes.

        Returns
        -------
        offsets : dict
            Of (key, False) the stash, of (key, True) what goes from I to W.
        extent : Extent
            Of the whole rank.
        """
        sizes, lives = self._sizes(), list(self._lives.values())
        plain, num_plain = place([size.plain for size in sizes], lives)
        padded, num_padded = place([size.padded for size in sizes], lives)
        offsets = {
            item: self._kept_at.after(Extent(*offset))
            for item, offset in zip(self._lives, zip(plain, padded, strict=True), strict=True)
        }
        return offsets, self._kept_at.after(Extent(num_plain, num_padded))

    def least_bytes(self) -> int:
        """Return a lower bound of the bytes of `place`, in a small part of its time."""
        sizes, lives = self._sizes(), list(self._lives.values())
        kept = Extent(*(most_at_once([size[part] for size in sizes], lives) for part in range(2)))
        return sum(self._kept_at.after(kept))

    def _sizes(self) -> list[Extent]:
        extents = {index: (stage.kept_extent, stage.upstream_extent) for index, stage in self.stages.items()}
        return [extents[stage][is_upstream] for (stage, _), is_upstream in self._lives]


def _lives(schedule: Schedule, rank: int) -> dict[tuple[Key, bool], Life]:
    """Return from which action to which the stash of a (stage, microbatch) lives, and what I leaves for W."""
    begins: dict[tuple[Key, bool], int] = {}
    lives: dict[tuple[Key, bool], Life] = {}
    for time, action in enumerate(schedule.actions[rank]):
        key = (action.stage, action.microbatch)
        if action.kind is Kind.F:
            begins[key, False] = time
        elif action.kind is Kind.I:
            begins[key, True] = time
        elif action.kind in (Kind.B, Kind.W):
            for is_upstream in (False, True):
                if (key, is_upstream) in begins:
                    lives[key, is_upstream] = begins.pop((key, is_upstream)), time
    # Without a backward nothing outlives its action.
    return lives or {item: (time, time) for item, time in begins.items()}


def _running(start: Extent, layouts: Sequence[Layout[str]]) -> list[Extent]:
    """Return where each of several layouts begins, and as the last where all end."""
    return list(accumulate((layout.extent for layout in layouts), Extent.after, initial=start))


def _streams(shape: StageShape, count: int) -> Layout[int]:
    return _layout(tuple((number, f32(*shape.stream_shape)) for number in range(count)), False)


def _stacked(specs: BufferShapes) -> Layout[str]:
    return _layout(tuple(specs.items()), False)


def _in_turn(parts: Mapping[str, BufferShapes]) -> Layout[tuple[str, str]]:
    """Lay out the working memory of a layer, whose scratch is in use in some of its steps only."""
    return _layout(tuple(((kind, name), spec) for kind, specs in parts.items() for name, spec in specs.items()), True)


# The blocks of a model ask for the same buffers.
@lru_cache(maxsize=256)
def _layout(specs: tuple[tuple[Any, BufferSpec], ...], shares_between_steps: bool) -> Layout[Any]:
    return Layout(dict(specs), shares_between_steps)
