"""Writing a checkpoint: every rank of one replica writes its file, rank 0 commits."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hpcpipe
from hpcpipe.checkpoint.layout import Piece
from hpcpipe.checkpoint.retain import retain
from hpcpipe.checkpoint.write import abandon, begin, commit, write_file
from hpcpipe.config.dump import to_dict
from hpcpipe.errors import HpcpipeError
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
        The ranks of the first replica write; the others hold the same bits.
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
    DiskError
        On every rank, if one of them could not write; earlier checkpoints are intact.
    """
    comm, is_root = grid.comm, grid.comm.rank == 0
    name, record, path = b"", b"", b""
    with together(comm, waiter):
        if is_root:
            name = str(begin(root, state.step)).encode()
    partial = Path(broadcast_bytes(comm, waiter, name if is_root else None, 0).decode())
    try:
        with together(comm, waiter):
            if grid.replica == 0:
                record = json.dumps(write_file(partial, grid.stage_rank, state.step, _pieces(state))).encode()
        records = [json.loads(content) for content in gather_bytes(comm, waiter, record) if content]
        with together(comm, waiter):
            if is_root:
                path = str(commit(partial, _header(state, grid, data), records)).encode()
                retain(root, state.config.checkpoint.keep)
    except HpcpipeError:
        if is_root:
            abandon(partial)
        raise
    return Path(broadcast_bytes(comm, waiter, path if is_root else None, 0).decode())


def _pieces(state: State) -> list[Piece]:
    return [
        Piece(tensor.name, kind, tensor.shape, 0, tensor.size, array)
        for stage in state.stages.values()
        for tensor in stage.owned()
        for kind, array in stage.arrays(tensor)
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
        "versions": {
            "hpcpipe": hpcpipe.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "scipy", "numba", "h5py", "mpi4py")},
            "mpi": library_version(),
        },
    }
