"""Small checkpoints of odd shapes for the tests of several rooms."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from support.writing import begin, write_file

from hpcpipe.checkpoint.layout import Piece
from hpcpipe.checkpoint.write import commit

_SHAPES = {
    "embedding/token/weight": ((13, 5), np.float32),
    "layers/003/attention/qkv/weight": ((7, 23), np.float32),
    "layers/003/attention/qkv/bias": ((23,), np.float32),
    "head/scale": ((), np.float64),
    "head/one": ((1,), np.float16),
    "head/none": ((0, 3), np.float32),
    "counters": ((2, 1, 3), np.int64),
}


def make_header(step: int) -> dict[str, Any]:
    """Make a header such as a run has."""
    return {
        "step": step,
        "tokens": 4096 * step,
        "model": {"kind": "gpt2", "layers": 4, "width": 128},
        "config": {"train": {"betas": (0.9, 0.95), "learning_rate": 1e-05}},
        "grid": {"pipeline": 2, "data": 1},
        "data": {"digest": "00ff"},
        "versions": {"hpcpipe": "0.1.0"},
    }


def make_tensors() -> dict[tuple[str, str], np.ndarray]:
    """Make the tensors of a model by (name, kind), the same ones each time."""
    random = np.random.default_rng(11)
    return {
        (name, kind): np.asarray(random.integers(-(2**13), 2**13, shape) * 0.37).astype(dtype)
        for name, (shape, dtype) in _SHAPES.items()
        for kind in ("weight", "moment1", "moment2")
    }


def make_pieces(num_writers: int) -> list[list[Piece]]:
    """Deal weights to the writers as wholes, and cut every moment into one piece per writer."""
    pieces: list[list[Piece]] = [[] for _ in range(num_writers)]
    for number, ((name, kind), data) in enumerate(make_tensors().items()):
        if kind == "weight" or data.size == 0:
            pieces[number % num_writers].append(Piece(name, kind, data.shape, 0, data.size, data))
            continue
        bounds = [data.size * writer // num_writers for writer in range(num_writers + 1)]
        for writer, (start, stop) in enumerate(pairwise(bounds)):
            pieces[writer].append(Piece(name, kind, data.shape, start, stop, data.reshape(-1)[start:stop]))
    return pieces


def make_checkpoint(root: Path, step: int, num_writers: int) -> tuple[Path, dict[tuple[str, str], np.ndarray]]:
    """Write and commit a checkpoint; return its directory and the tensors in it."""
    partial = begin(root, step)
    records = [write_file(partial, writer, step, pieces) for writer, pieces in enumerate(make_pieces(num_writers))]
    return commit(partial, make_header(step), records), make_tensors()
