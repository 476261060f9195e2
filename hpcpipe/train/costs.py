"""The measured costs that plans are made from: of this run, or of an earlier one on the same kind of machine."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe.cluster import processor
from hpcpipe.config.schema import Config
from hpcpipe.errors import DiskError
from hpcpipe.kernels.jit import CACHE_DIRECTORY
from hpcpipe.kernels.threads import ALONE, Team
from hpcpipe.mpi.collectives import barrier, broadcast_bytes, gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.ping import measure_message_s
from hpcpipe.mpi.wait import Waiter
from hpcpipe.pipeline.stage import Stage
from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.telemetry.files import now, write_whole
from hpcpipe.train.profile import LayerCosts, profile_layers
from hpcpipe.train.stopwatch import TimedLayer

_VERSION = 1
_FRESH_S = 24 * 3600.0
_LONGEST_S = 1e6
_KINDS = ("embedding", "block", "head")


@dataclass(frozen=True)
class MeasuredCosts:
    """What layers and messages take on this machine.

    Attributes
    ----------
    embedding, block, head : LayerCosts
        Of one layer of each kind, for one microbatch.
    message_s : float
        Seconds until a message of one residual stream is there.
    measured : str
        When, as ISO 8601 in UTC.
    from_cache : bool
        Whether another run measured them.
    overhead : float
        How many times as long as its layers explain the last run's step took: for reading samples, for messages, and
        for ranks that wait for each other's slow moments.
    """

    embedding: LayerCosts
    block: LayerCosts
    head: LayerCosts
    message_s: float
    measured: str
    from_cache: bool
    overhead: float = 1.0

    def of_model(self, num_blocks: int) -> list[LayerCosts]:
        """Return the costs of each layer of a model: embedding, blocks, head."""
        return [self.embedding, *[self.block] * num_blocks, self.head]

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to files: seconds under the names of the attributes."""
        return {
            "version": _VERSION,
            "measured": self.measured,
            "message_s": self.message_s,
            "overhead": self.overhead,
            **{kind: asdict(getattr(self, kind)) for kind in _KINDS},
        }


def obtain_costs(config: Config, grid: Grid, waiter: Waiter, num_local_ranks: int, team: Team = ALONE) -> MeasuredCosts:
    """Return the same costs on every rank: from the cache if they are there and not older than a day, else measured.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.
    grid : Grid
        All ranks take part; they measure at the same time, as they will compute.
    waiter : Waiter
        Waits, with its deadline.
    num_local_ranks : int
        Ranks on this node.
    team : Team
        The threads of this rank.
    """
    path = cache_path(config, num_local_ranks)
    content = (_read_fresh(path) if grid.comm.rank == 0 else None) or b""
    content = broadcast_bytes(grid.comm, waiter, content if grid.comm.rank == 0 else None, 0)
    if content:
        return _parse(json.loads(content), from_cache=True)
    costs = _measure(config, grid, waiter, team)
    if grid.comm.rank == 0:
        keep_costs(path, costs)
    return costs


def observed_costs(
    costs: MeasuredCosts,
    config: Config,
    schedule: Schedule,
    stages: Mapping[int, Stage],
    grid: Grid,
    waiter: Waiter,
) -> MeasuredCosts | None:
    """Return what the layers took in a whole run.

    Parameters
    ----------
    costs : MeasuredCosts
        What this run was planned with; message and update stay as they are.
    config : Config
        Resolved.
    schedule : Schedule
        What was run: whether the halves of a stage's backward were apart.
    stages : mapping of int to Stage
        This rank's, of `TimedLayer`.
    grid : Grid
        All ranks take part.
    waiter : Waiter
        Waits, with its deadline.

    Returns
    -------
    MeasuredCosts or None
        On rank 0, None on the others.
    """
    is_apart = {action.stage for action in schedule.actions[grid.stage_rank] if action.kind is Kind.I}
    recompute = config.train.recompute
    seen: dict[str, list[tuple[float, float]]] = {kind: [] for kind in _KINDS}
    for index, stage in stages.items():
        for place, layer in enumerate(stage.layers):
            assert isinstance(layer, TimedLayer)
            is_head = index + 1 == schedule.num_stages and place + 1 == len(stage.layers)
            kind = "embedding" if index == place == 0 else "head" if is_head else "block"
            seen[kind].append(_observed(layer, getattr(costs, kind), index in is_apart, recompute))
    own = [np.median(np.array(rows), axis=0) if rows else np.full(2, np.nan) for rows in seen.values()]
    rows = gather_rows(grid.comm, waiter, np.array(own).reshape(-1)).reshape(grid.comm.size, len(_KINDS), 2)
    if grid.comm.rank != 0:
        return None
    medians = np.nanmedian(rows, axis=0).tolist()
    embedding, block, head = (
        _scaled(getattr(costs, kind), forward, backward)
        for kind, (forward, backward) in zip(_KINDS, medians, strict=True)
    )
    return MeasuredCosts(embedding, block, head, costs.message_s, now(), from_cache=False)


def _observed(layer: TimedLayer, costs: LayerCosts, is_apart: bool, recompute: str) -> tuple[float, float]:
    """Return a layer's forward, and its backward as a multiple of what was known."""
    forward = layer.mean_s("forward")
    backward = layer.mean_s("backward_input") + layer.mean_s("backward_weight")
    if recompute == "full":
        backward += forward * (2 if is_apart else 1)
    elif layer.taken["recompute"]:
        backward += layer.mean_s("recompute")
    known = costs.backward_input + costs.backward_weight if is_apart else costs.backward
    return forward, backward / known if known > 0 else 1.0


def _scaled(costs: LayerCosts, forward: float, backward: float) -> LayerCosts:
    parts = (costs.backward_input * backward, costs.backward_weight * backward, costs.backward * backward)
    return LayerCosts(forward, *parts, costs.update)


def cache_path(config: Config, num_local_ranks: int) -> Path:
    """Return the file that keeps the costs: its name says everything that they depend on."""
    model, parallel = config.model, config.parallel
    facts = [
        _VERSION,
        *(model.kind, model.layers, model.width, model.heads, model.context, model.vocab),
        *(parallel.microbatch_size, config.train.recompute, config.train.precision, parallel.threads),
        *(num_local_ranks, parallel.pipeline, processor.model_name(), processor.features()),
    ]
    return CACHE_DIRECTORY / "costs" / f"{blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()}.json"


def _measure(config: Config, grid: Grid, waiter: Waiter, team: Team) -> MeasuredCosts:
    parallel, model = config.parallel, config.model
    barrier(grid.comm, waiter)
    layers = profile_layers(config, team)
    rows = gather_rows(grid.comm, waiter, np.array([astuple(layer) for layer in layers]).reshape(-1))
    # Ranks that some other program held up must not decide for all.
    medians = np.median(rows, axis=0).reshape(len(_KINDS), -1).tolist()
    embedding, block, head = (LayerCosts(*costs) for costs in medians)
    stream_bytes = 4 * parallel.microbatch_size * model.context * model.width
    # Neighbours among all ranks are neighbours in a pipeline, or replicas where a pipeline is one rank.
    message_s = measure_message_s(grid.comm, waiter, stream_bytes)
    return MeasuredCosts(embedding, block, head, message_s, now(), from_cache=False)


def _read_fresh(path: Path) -> bytes | None:
    """Return the bytes of a cache file, unless it is missing, old, or not what it should be."""
    try:
        if not path.is_file() or not 0 <= time.time() - path.stat().st_mtime < _FRESH_S:
            return None
        content = path.read_bytes()
        _parse(json.loads(content), from_cache=True)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None
    return content


def _parse(document: dict[str, Any], from_cache: bool) -> MeasuredCosts:
    if document["version"] != _VERSION:
        raise ValueError(f"version {document['version']}")
    kinds = [LayerCosts(*(float(document[kind][field.name]) for field in fields(LayerCosts))) for kind in _KINDS]
    message_s, overhead = float(document["message_s"]), float(document["overhead"])
    times = [value for costs in kinds for value in astuple(costs)]
    if not (0 <= message_s < _LONGEST_S and overhead >= 1 and math.isfinite(overhead)):
        raise ValueError("message or overhead is impossible")
    embedding, block, head = kinds
    if not all(0 <= value < _LONGEST_S for value in times) or min(block.forward, block.backward) == 0:
        raise ValueError("a cost is not a time")
    return MeasuredCosts(embedding, block, head, message_s, str(document["measured"]), from_cache, overhead)


def keep_costs(path: Path, costs: MeasuredCosts) -> None:
    """Write the cache, where that is possible: without it the next run measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(costs.to_dict(), indent=2) + "\n")
    except (OSError, DiskError):
        return
