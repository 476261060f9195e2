"""Checkpoints whose every byte follows from a seed and a step, so that what is loaded can be compared."""

import random
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from support.version1 import write_version1
from support.writing import begin, write_file

from hpcpipe.checkpoint.layout import Piece, PieceSpec, candidates
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.verify import verify_metadata
from hpcpipe.checkpoint.write import commit
from hpcpipe.errors import DamagedError

KINDS = ("weight", "moment1", "moment2")


@dataclass(frozen=True)
class Model:
    """Names and shapes of tensors, and how many ranks write them."""

    seed: str
    shapes: dict[str, tuple[int, ...]]
    num_writers: int

    def tensors(self, step: int) -> dict[tuple[str, str], np.ndarray]:
        """Make what a run has after a step, by (name, kind)."""
        draw = np.random.default_rng(np.frombuffer(f"{self.seed}/{step}".encode(), np.uint8))
        return {
            (name, kind): draw.standard_normal(shape, np.float32)
            for name, shape in self.shapes.items()
            for kind in KINDS
        }

    def pieces(self, step: int) -> list[list[Piece]]:
        """Cut the tensors: weights go to the writers in turn, each moment into a piece for each."""
        pieces: list[list[Piece]] = [[] for _ in range(self.num_writers)]
        for number, ((name, kind), data) in enumerate(self.tensors(step).items()):
            if kind == "weight":
                pieces[number // 3 % self.num_writers].append(Piece(name, kind, data.shape, 0, data.size, data))
                continue
            bounds = [data.size * writer // self.num_writers for writer in range(self.num_writers + 1)]
            for writer, (start, stop) in enumerate(pairwise(bounds)):
                pieces[writer].append(Piece(name, kind, data.shape, start, stop, data.reshape(-1)[start:stop]))
        return pieces

    def specs(self) -> list[list[PieceSpec]]:
        """Return the pieces without data."""
        return [[piece.spec for piece in pieces] for pieces in self.pieces(0)]

    def header(self, step: int) -> dict[str, Any]:
        """Make the header of a step."""
        return {"step": step, "model": {"seed": self.seed}, "val_loss": step % 7 / 3 if step % 2 else None}

    def write(self, root: Path, step: int, version: int = 2) -> Path:
        """Write and commit a checkpoint without any process beside this one."""
        if version == 1:
            return write_version1(root, self.header(step), self.pieces(step))
        partial = begin(root, step)
        records = [write_file(partial, writer, step, held) for writer, held in enumerate(self.pieces(step))]
        return commit(partial, self.header(step), records)


def draw_model(draw: random.Random, seed: str) -> Model:
    """Draw a small model for 2 to 4 writers; some have tensors of several disk blocks."""
    largest = draw.choice((6, 40, 200))
    shapes = {
        f"layers/{number:03d}/weight": tuple(draw.randint(1, largest) for _ in range(draw.randint(1, 2)))
        for number in range(draw.randint(2, 5))
    }
    return Model(seed, {name: shape for name, shape in shapes.items() if prod(shape)}, draw.randint(2, 4))


def load_newest(root: Path, draw: random.Random) -> tuple[Path, dict[tuple[str, str], np.ndarray], list[str]] | None:
    """Start again as `hpcpipe.train.restore` does, with one to three ranks that each read a range of each tensor.

    Returns
    -------
    (Path, dict, list of str) or None
        The checkpoint that was taken, its tensors by (name, kind), and why newer ones were not; None if there is none.
    """
    refused: list[str] = []
    for path in candidates(root):
        try:
            return path, _load(path, draw.randint(1, 3)), refused
        except DamagedError as error:
            refused.append(str(error))
    return None


def _load(path: Path, num_readers: int) -> dict[tuple[str, str], np.ndarray]:
    manifest = load_manifest(path)
    for name in manifest.files:
        problems = verify_metadata(path, manifest, name)
        if problems:
            raise DamagedError("; ".join(problems))
    loaded = {
        (name, kind): np.zeros(tensor.shape, tensor.dtype)
        for name, tensor in manifest.tensors.items()
        for kind in tensor.kinds
    }
    for number in range(num_readers):
        with Reader(path, manifest) as reader:
            for (name, kind), data in loaded.items():
                start, stop = (data.size * index // num_readers for index in (number, number + 1))
                reader.read(name, kind, data.reshape(-1)[start:stop], start, stop)
    return loaded
