"""Names: the directory of a step, the files in it, the tensors in a file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hpcpipe.errors import DamagedError, UsageError

FORMAT = "hpcpipe-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
VIEW = "view.h5"
DTYPES = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64"}) | frozenset(
    {"uint8", "uint16", "uint32", "uint64"}
)

EPOCH_DIGITS = 4
"""Digits of `epoch_text`."""

_NAME_LETTERS_AT_MOST = 500
_STEP = re.compile(r"step-([0-9]{8,})\Z")
_LEFTOVER = re.compile(r"(step-[0-9]{8,}(\.[0-9a-f]+)?\.partial|trash-.+)\Z", re.DOTALL)
_FILE = re.compile(r"rank-[0-9]{4,9}\.h5\Z")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,99}\Z")
_TENSOR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z")


@dataclass(frozen=True)
class PieceSpec:
    """A range of one tensor's elements that one rank writes, without the elements.

    Attributes
    ----------
    name : str
        Global name of the tensor, such as ``layers/003/attention/qkv/weight``.
    kind : str
        ``weight``, ``moment1`` or ``moment2``.
    shape : tuple of int
        Shape of the whole tensor.
    start, stop : int
        The elements ``[start, stop)`` of the tensor in C order; the whole tensor is ``[0, product of shape)``.
    dtype : str
        Name of the elements' type, such as ``float32``.

    Raises
    ------
    ValueError
        No file could hold it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int
    dtype: str

    def __post_init__(self) -> None:
        if not is_kind(self.kind) or not is_tensor_name(self.name):
            raise ValueError(f"{self.label!r}: kind and name may hold letters, digits, '_', '.', '-'; names also '/'")
        if min(self.shape, default=0) < 0 or not 0 <= self.start <= self.stop <= prod(self.shape):
            raise ValueError(
                f"{self.label}: elements [{self.start}, {self.stop}) are not within its {prod(self.shape)} elements"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.label}: cannot store {self.dtype}; one of {', '.join(sorted(DTYPES))} can be")

    @property
    def label(self) -> str:
        """The piece in messages."""
        return f"{self.kind} of {self.name}"

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def is_whole(self) -> bool:
        """Whether the piece is the whole tensor."""
        return self.start == 0 and self.stop == prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes, JSON-able."""
        return {**vars(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, item: dict[str, Any]) -> Self:
        """Return the spec that `to_json` was called on.

        Raises
        ------
        ValueError, TypeError, KeyError
            Something is missing or impossible.
        """
        shape = tuple(int(extent) for extent in item["shape"])
        return cls(item["name"], item["kind"], shape, int(item["start"]), int(item["stop"]), item["dtype"])


@dataclass(frozen=True)
class Piece:
    """A range of one tensor's elements that one rank writes; the attributes as in `PieceSpec`.

    Attributes
    ----------
    data : array of stop - start elements
        C-contiguous, of any shape; owned by the caller and only read.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int
    data: NDArray[Any]

    def __post_init__(self) -> None:
        spec = self.spec
        if self.data.size != spec.size or not self.data.flags.c_contiguous:
            raise ValueError(
                f"{spec.label}: elements [{self.start}, {self.stop}) need {spec.size} contiguous elements, "
                f"got {self.data.size}{'' if self.data.flags.c_contiguous else ', not contiguous'}"
            )
        if not self.data.dtype.isnative:
            raise ValueError(f"{spec.label}: cannot store {self.data.dtype} in another byte order than the machine's")

    @property
    def spec(self) -> PieceSpec:
        """The piece without its data."""
        shape = tuple(int(extent) for extent in self.shape)
        return PieceSpec(self.name, self.kind, shape, int(self.start), int(self.stop), self.data.dtype.name)

    @property
    def buffer(self) -> memoryview:
        """The bytes of the data, not copied."""
        return self.data.reshape(-1).view(np.uint8).data


def step_name(step: int) -> str:
    """Name the directory of a step."""
    return f"step-{step:08d}"


def partial_name(step: int, token: str = "") -> str:
    """Name the directory of a step while it is written; a token keeps apart what two launches write."""
    return ".".join(filter(None, (step_name(step), token, "partial")))


def epoch_text(epoch: int) -> str:
    """Return the hexadecimal digits that stand for an epoch of a launch in the names of unfinished checkpoints."""
    return f"{min(epoch, 16**EPOCH_DIGITS - 1):0{EPOCH_DIGITS}x}"


def step_of(name: str) -> int | None:
    """Read the step from the name of a committed checkpoint's directory; None for any other name."""
    found = _STEP.match(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def file_name(writer: int) -> str:
    """Name the file of a writing rank."""
    return f"rank-{writer:04d}.h5"


def is_file_name(name: str) -> bool:
    """Tell whether a manifest may name this file: never a path out of the directory."""
    return _FILE.match(name) is not None


def is_tensor_name(name: str) -> bool:
    """Tell whether a tensor may have this global name."""
    return len(name) <= _NAME_LETTERS_AT_MOST and _TENSOR.match(name) is not None


def is_kind(name: str) -> bool:
    """Tell whether a kind of tensor may have this name."""
    return _KIND.match(name) is not None


def candidates(root: Path) -> list[Path]:
    """List the directories below `root` that have a committed checkpoint's name.

    Parameters
    ----------
    root : Path
        The ``checkpoints`` directory of a run; it need not exist.

    Returns
    -------
    list of Path
        Newest step first. Nothing is opened: whether a checkpoint is sound is for ``verify`` to say.
    """
    if not root.is_dir():
        return []
    steps = {path: step_of(path.name) for path in root.iterdir()}
    known = [(step, path) for path, step in steps.items() if step is not None and path.is_dir()]
    return [path for _, path in sorted(known, reverse=True)]


def leftovers(root: Path) -> Iterator[Path]:
    """List what an interrupted writing or removal left below `root`."""
    if root.is_dir():
        yield from sorted(path for path in root.iterdir() if _LEFTOVER.match(path.name))


def locate(path: Path) -> list[Path]:
    """Find the checkpoints that a path stands for.

    Parameters
    ----------
    path : Path
        The directory of one checkpoint, a ``checkpoints`` directory, or a run directory.

    Returns
    -------
    list of Path
        Newest step first, at least one.

    Raises
    ------
    UsageError
        `path` is not a directory.
    DamagedError
        There is no checkpoint in it.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such directory; give a run directory or one of its checkpoints")
    if (path / MANIFEST).exists() or step_of(path.resolve().name) is not None:
        # A link that somebody names is followed; one that is found in a run is not.
        return [path.resolve() if path.is_symlink() else path]
    found = candidates(path) or candidates(path / "checkpoints")
    if not found:
        raise DamagedError(f"{path}: holds no checkpoint (no directory such as checkpoints/{step_name(100)})")
    return found
