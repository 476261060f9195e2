"""Writing a checkpoint: every rank writes its shard, rank 0 commits."""

import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hpcpipe
from hpcpipe.checkpoint.layout import Piece
from hpcpipe.checkpoint.retain import retain
from hpcpipe.checkpoint.write import abandon, begin, commit, write_file
from hpcpipe.config.dump import to_dict
from hpcpipe.errors import HpcpipeError, NumericsError
from hpcpipe.kernels.features import family
from hpcpipe.kernels.reduce import sum_of_squares
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.collectives import broadcast_bytes, gather_bytes
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.runtime import library_version
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.state import State


def save(state: State, grid: Grid, waiter: Waiter, root: Path, data: dict[str, str]) -> Path:
    """Write and commit a checkpoint of the last finished step, and remove the oldest ones.

    Parameters
    ----------
    state : State
        Only read.
    grid : Grid
        Every rank writes what it updates: its replica's shard of its stages.
    waiter : Waiter
        Waits, with its deadline.
    root : Path
        The run's ``checkpoints`` directory.
    data : dict
        Identifies the token file and its tokenizer.

    Returns
    -------
    Path
        The checkpoint's directory, on every rank.

    Raises
    ------
    NumericsError
        On every rank, if a weight or moment is not a finite number; nothing is written.
    DiskError
        On every rank, if one of them could not write; earlier checkpoints are intact.
    """
    comm, is_root = grid.comm, grid.comm.rank == 0
    name, record, path = b"", b"", b""
    with together(comm, waiter):
        _require_finite(state)
    with together(comm, waiter):
        if is_root:
            name = os.fsencode(begin(root, state.step))
    partial = Path(os.fsdecode(broadcast_bytes(comm, waiter, name if is_root else None, 0)))
    try:
        with together(comm, waiter):
            pieces = _pieces(state)
            if pieces:
                record = json.dumps(write_file(partial, comm.rank, state.step, pieces)).encode()
        records = [json.loads(content) for content in gather_bytes(comm, waiter, record) if content]
        with together(comm, waiter):
            if is_root:
                committed = commit(partial, _header(state, grid, data), records)
                retain(root, committed, keep=state.config.checkpoint.keep)
                path = os.fsencode(committed)
    except HpcpipeError:
        if is_root:
            abandon(partial)
        raise
    return Path(os.fsdecode(broadcast_bytes(comm, waiter, path if is_root else None, 0)))


def _require_finite(state: State) -> None:
    """Refuse to keep a state that an update has broken: the next start would only fail again."""
    for index, stage in state.stages.items():
        for arena in (stage.parameters.weights, *stage.moments.values()):
            if not math.isfinite(sum_of_squares(arena.flat)):
                raise NumericsError(
                    f"step {state.step}: weights or moments of stage {index} are not finite: no checkpoint is written;"
                    f" lower train.learning_rate ({state.config.train.learning_rate:g}) and go on from the last one"
                )


def _pieces(state: State) -> list[Piece]:
    shapes = {tensor.name: tensor.shape for layer in state.model for tensor in layer.tensors}
    return [
        Piece(held.name, kind, shapes[held.name], held.start, held.stop, array)
        for stage in state.stages.values()
        for held in stage.owned_slices(stage.shard)
        for kind, array in stage.arrays(held)
    ]


def _header(state: State, grid: Grid, data: dict[str, str]) -> dict[str, Any]:
    config = to_dict(state.config)
    return {
        "step": state.step,
        "tokens": state.step * state.tokens_per_step,
        "model": config["model"],
        "config": config,
        "grid": {"pipeline": grid.pipeline, "data": grid.data},
        "data": data,
        "kernels": family() if state.config.train.precision == "bf16" else "blas",
        "versions": {
            "hpcpipe": hpcpipe.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "scipy", "numba", "h5py", "mpi4py")},
            "mpi": library_version(),
        },
    }
