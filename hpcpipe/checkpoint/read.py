"""Tensors from a checkpoint, whoever wrote which part of them."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hpcpipe.checkpoint.layout import new_hash
from hpcpipe.checkpoint.table import Manifest, PieceEntry, TensorEntry
from hpcpipe.errors import DamagedError

_OPEN_AT_MOST = 16


class Reader:
    """Fills the caller's buffers from the files of a checkpoint.

    The bytes are taken from where the manifest says they are, straight into the buffer. A range of elements is
    no selection that HDF5 could express, and a file that was damaged or made to do harm is never given to HDF5.

    Parameters
    ----------
    path : Path
        Directory of a committed checkpoint.
    manifest : Manifest
        Its manifest. Files are opened when they are needed; ``verify`` is what checks all of their bytes.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._handles: dict[str, int] = {}

    def read(self, name: str, kind: str, out: NDArray[Any], start: int = 0, stop: int | None = None) -> None:
        """Read the elements ``[start, stop)`` of a tensor.

        Parameters
        ----------
        name : str
            Global name of the tensor.
        kind : str
            ``weight``, ``moment1`` or ``moment2``.
        out : array
            C-contiguous, of the tensor's dtype, stop - start elements; either 1-D or of the tensor's shape. Owned
            by the caller; its content is undefined after an error.
        start, stop : int
            Elements in C order; `stop` None: up to the tensor's last.

        Raises
        ------
        DamagedError
            The checkpoint has no such tensor, or it has another shape or dtype; a file is missing, of another
            size, or unreadable; a piece that was read as a whole has another hash.
        ValueError
            `out` is not contiguous, or the range lies outside the tensor.
        """
        tensor = self._manifest.tensors.get(name)
        if tensor is None or kind not in tensor.kinds:
            raise DamagedError(f"{self._path}: has no {kind} of {name}: it is of another model")
        stop = tensor.size if stop is None else stop
        self._check(tensor, f"{kind} of {name}", out, start, stop)
        target = out.reshape(-1).view(np.uint8)
        for piece in tensor.kinds[kind]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                part = target[(first - start) * tensor.item_bytes : (last - start) * tensor.item_bytes]
                self._fill(piece, piece.offset + (first - piece.start) * tensor.item_bytes, part)
                if (first, last) == (piece.start, piece.stop):
                    self._check_hash(piece, f"{kind} of {name}", part)

    def close(self) -> None:
        """Close the files; the reader may still be used, and opens them again."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, tensor: TensorEntry, label: str, out: NDArray[Any], start: int, stop: int) -> None:
        """Refuse a buffer that the range does not fit."""
        if not 0 <= start <= stop <= tensor.size:
            raise ValueError(f"{label}: elements [{start}, {stop}) are not within its {tensor.size} elements")
        if not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"{label}: the buffer must be contiguous and writeable")
        fits = out.size == stop - start and (out.ndim == 1 or out.shape == tensor.shape)
        if not fits or out.dtype != np.dtype(tensor.dtype):
            wanted = f"{stop - start} of its {tensor.size} elements" if out.ndim == 1 else "all of it"
            raise DamagedError(
                f"{self._path}: {label} is {tensor.dtype} of shape {list(tensor.shape)}; {wanted} cannot be read as "
                f"{out.dtype} of shape {list(out.shape)}: it is of another model"
            )

    def _fill(self, piece: PieceEntry, offset: int, target: NDArray[np.uint8]) -> None:
        """Read bytes of a file into a buffer."""
        try:
            handle = self._open(piece.file)
            done = 0
            while done < target.size:
                count = os.preadv(handle, [target[done:].data], offset + done)
                if count == 0:
                    raise DamagedError(f"{self._path / piece.file}: ends at byte {offset + done:,}, it was truncated")
                done += count
        except OSError as error:
            raise DamagedError(f"{self._path / piece.file}: cannot be read: {error.strerror}") from error

    def _open(self, name: str) -> int:
        """Open a file, or find it open; few stay open, however many ranks wrote."""
        if name not in self._handles:
            if len(self._handles) >= _OPEN_AT_MOST:
                os.close(self._handles.pop(next(iter(self._handles))))
            handle = self._handles[name] = os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC)
            size, expected = os.fstat(handle).st_size, self._manifest.files[name].size_bytes
            if size != expected:
                raise DamagedError(f"{self._path / name}: has {size:,} bytes, the manifest says {expected:,}")
        return self._handles[name]

    def _check_hash(self, piece: PieceEntry, label: str, data: NDArray[np.uint8]) -> None:
        """Compare a whole piece with its hash."""
        digest = new_hash()
        digest.update(data.data)
        if digest.hexdigest() != piece.blake2b:
            raise DamagedError(
                f"{self._path / piece.file}: {label} was altered after it was written (its hash differs)"
            )
