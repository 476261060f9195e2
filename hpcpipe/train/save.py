"""What a checkpoint of a run holds: the pieces that each rank writes, and what it says about itself."""

import platform
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

import hpcpipe
from hpcpipe.checkpoint.layout import PieceSpec
from hpcpipe.config.dump import to_dict
from hpcpipe.kernels.features import family
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.runtime import library_version
from hpcpipe.optim.adamw import MOMENTS
from hpcpipe.train.stage_tensors import StageTensors
from hpcpipe.train.state import State

SNAPSHOT = "snapshot"
"""What the memory of the copy that is written is counted under."""

_ELEMENT_BYTES = 4


def piece_sizes(stages: Iterable[StageTensors], shard: int) -> list[int]:
    """Return the bytes of each piece that a rank writes, in the order of `piece_specs`."""
    kinds = 1 + len(MOMENTS)
    return [held.size * _ELEMENT_BYTES for stage in stages for held in stage.owned_slices(shard) for _ in range(kinds)]


def piece_specs(state: State) -> list[PieceSpec]:
    """Return what this rank writes: of each tensor that its stages own, its replica's part, weight and moments."""
    shapes = {tensor.name: tensor.shape for layer in state.model for tensor in layer.tensors}
    return [
        PieceSpec(held.name, kind, shapes[held.name], held.start, held.stop, array.dtype.name)
        for stage in state.stages.values()
        for held in stage.owned_slices(stage.shard)
        for kind, array in stage.arrays(held)
    ]


def piece_arrays(state: State) -> Iterator[np.ndarray]:
    """Yield the elements of each of the `piece_specs`; views of the state."""
    for stage in state.stages.values():
        for held in stage.owned_slices(stage.shard):
            for _, array in stage.arrays(held):
                yield array


def header_of(state: State, grid: Grid, data: dict[str, str], facts: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says about itself.

    Parameters
    ----------
    state : State
        Of the step that the checkpoint is of.
    grid : Grid
        Of the ranks that write it.
    data : dict
        Identifies the token file and its tokenizer.
    facts : dict
        More of the kind, JSON-able: ``val_loss`` if the step was evaluated, ``fence`` of the run's lock.
    """
    config = to_dict(state.config)
    return {
        "step": state.step,
        "tokens": state.step * state.tokens_per_step,
        "model": config["model"],
        "config": config,
        "grid": {"pipeline": grid.pipeline, "data": grid.data},
        "data": data,
        "kernels": family() if state.config.train.precision == "bf16" else "blas",
        "versions": _versions(),
        **facts,
    }


@cache
def _versions() -> dict[str, str]:
    return {
        "hpcpipe": hpcpipe.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "scipy", "numba", "h5py", "blake3", "mpi4py")},
        "mpi": library_version(),
    }
