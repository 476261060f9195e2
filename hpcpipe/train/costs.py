"""The measured costs that plans are made from: of this run, or of an earlier one on the same kind of machine."""

import json
import math
import time
from dataclasses import asdict, astuple, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe.cluster import processor
from hpcpipe.config.schema import Config
from hpcpipe.errors import DiskError
from hpcpipe.kernels.jit import CACHE_DIRECTORY
from hpcpipe.mpi.collectives import barrier, broadcast_bytes, gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.ping import measure_message_s
from hpcpipe.mpi.wait import Waiter
from hpcpipe.telemetry.files import now, write_whole
from hpcpipe.train.profile import LayerCosts, profile_layers

_VERSION = 1
_FRESH_S = 24 * 3600.0
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
    """

    embedding: LayerCosts
    block: LayerCosts
    head: LayerCosts
    message_s: float
    measured: str
    from_cache: bool

    def of_model(self, num_blocks: int) -> list[LayerCosts]:
        """Return the costs of each layer of a model: embedding, blocks, head."""
        return [self.embedding, *[self.block] * num_blocks, self.head]

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to files: seconds under the names of the attributes."""
        return {
            "version": _VERSION,
            "measured": self.measured,
            "message_s": self.message_s,
            **{kind: asdict(getattr(self, kind)) for kind in _KINDS},
        }


def obtain_costs(config: Config, grid: Grid, waiter: Waiter, num_local_ranks: int) -> MeasuredCosts:
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
    """
    path = cache_path(config, num_local_ranks)
    content = (_read_fresh(path) if grid.comm.rank == 0 else None) or b""
    content = broadcast_bytes(grid.comm, waiter, content if grid.comm.rank == 0 else None, 0)
    if content:
        return _parse(json.loads(content), from_cache=True)
    costs = _measure(config, grid, waiter)
    if grid.comm.rank == 0:
        _keep(path, costs)
    return costs


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


def _measure(config: Config, grid: Grid, waiter: Waiter) -> MeasuredCosts:
    parallel, model = config.parallel, config.model
    barrier(grid.comm, waiter)
    layers = profile_layers(config)
    rows = gather_rows(grid.comm, waiter, np.array([astuple(layer) for layer in layers]).reshape(-1))
    # Ranks that some other program held up must not decide for all.
    medians = np.median(rows, axis=0).reshape(len(_KINDS), -1).tolist()
    kinds = {kind: LayerCosts(*costs) for kind, costs in zip(_KINDS, medians, strict=True)}
    stream_bytes = 4 * parallel.microbatch_size * model.context * model.width
    # Neighbours among all ranks are neighbours in a pipeline, or replicas where a pipeline is one rank.
    message_s = measure_message_s(grid.comm, waiter, stream_bytes)
    return MeasuredCosts(**kinds, message_s=message_s, measured=now(), from_cache=False)


def _read_fresh(path: Path) -> bytes | None:
    """Return the bytes of a cache file, unless it is missing, old, or not what it should be."""
    try:
        if not 0 <= time.time() - path.stat().st_mtime < _FRESH_S:
            return None
        content = path.read_bytes()
        _parse(json.loads(content), from_cache=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content


def _parse(document: dict[str, Any], from_cache: bool) -> MeasuredCosts:
    if document["version"] != _VERSION:
        raise ValueError(f"version {document['version']}")
    kinds = {kind: LayerCosts(*(float(document[kind][field.name]) for field in fields(LayerCosts))) for kind in _KINDS}
    message_s = float(document["message_s"])
    times = [message_s, *(value for costs in kinds.values() for value in astuple(costs))]
    if not all(math.isfinite(value) and value >= 0 for value in times):
        raise ValueError("a cost is not a time")
    return MeasuredCosts(**kinds, message_s=message_s, measured=str(document["measured"]), from_cache=from_cache)


def _keep(path: Path, costs: MeasuredCosts) -> None:
    """Write the cache, where that is possible: without it the next run measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(costs.to_dict(), indent=2) + "\n")
    except (OSError, DiskError):
        return
