"""Tensors from a checkpoint, whoever wrote which part of them."""

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hpcpipe.checkpoint.digests import new_hash
from hpcpipe.checkpoint.files import hash_range, new_block, open_regular, read_range
from hpcpipe.checkpoint.table import Manifest, PieceEntry, TensorEntry
from hpcpipe.errors import DamagedError

_OPEN_AT_MOST = 16


class Wanted(NamedTuple):
    """A range of a tensor's elements, and the caller's buffer for it: the parameters of `Reader.read`."""

    name: str
    kind: str
    out: NDArray[Any]
    start: int = 0
    stop: int | None = None


class Reader:
    """Fills the caller's buffers from the files of a checkpoint, and checks every piece that it touches.

    The bytes are taken from where the manifest says they are, straight into the buffer. A range of elements is
    no selection that HDF5 could express, and a file that was damaged or made to do harm is never given to HDF5.
    Of a piece that is wanted in part all is read once, for its hash; later parts of it are read alone.

    Parameters
    ----------
    path : Path
        Directory of a committed checkpoint.
    manifest : Manifest
        Its manifest. Files are opened when they are needed. ``verify_metadata`` checks the bytes around the tensors.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._handles: dict[str, int] = {}
        self._checked: set[tuple[str, int]] = set()

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
            size, or unreadable; a piece that the range touches has another hash.
        ValueError
            `out` is not contiguous, or the range lies outside the tensor.
        """
        tensor = self._manifest.tensors.get(name)
        if tensor is None or kind not in tensor.kinds:
            raise DamagedError(f"{self._path}: has no {kind} of {name}: it is of another model")
        stop = tensor.size if stop is None else stop
        label = f"{kind} of {name}"
        self._check(tensor, label, out, start, stop)
        target = out.reshape(-1).view(np.uint8)
        for piece in tensor.kinds[kind]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                part = target[(first - start) * tensor.item_bytes : (last - start) * tensor.item_bytes]
                self._fill(piece, tensor.item_bytes, (first - piece.start) * tensor.item_bytes, part.data, label)

    def read_all(self, wanted: Iterable[Wanted]) -> None:
        """Read several ranges as `read` does, in the order in which they lie in the files.

        Parameters
        ----------
        wanted : iterable of Wanted
            In any order.

        Raises
        ------
        DamagedError, ValueError
            As `read`; which of the buffers are filled is then undefined.
        """
        for item in sorted(wanted, key=self._place):
            self.read(*item)

    def _place(self, item: Wanted) -> tuple[str, int]:
        """Return the file and the byte where a range begins, as far as the manifest knows it."""
        tensor = self._manifest.tensors.get(item.name)
        for piece in tensor.kinds.get(item.kind, ()) if tensor else ():
            if piece.stop > item.start:
                return piece.file, piece.offset
        return "", 0

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

    def _fill(self, piece: PieceEntry, item_bytes: int, skip: int, target: memoryview, label: str) -> None:
        """Read a piece from its byte `skip` on into a buffer, and compare it with its hash unless that was done."""
        path, num_bytes = self._path / piece.file, (piece.stop - piece.start) * item_bytes
        is_part, key = target.nbytes < num_bytes, (piece.file, piece.offset)
        try:
            handle = self._open(piece.file)
            if is_part and key in self._checked:
                done = skip + read_range(handle, piece.offset + skip, target)
                num_bytes = skip + target.nbytes
            else:
                rest = num_bytes - skip - target.nbytes
                block = new_block(max(skip, rest) if is_part else 0)
                digest = new_hash(self._manifest.version)
                done = hash_range(handle, piece.offset, skip, digest, block)
                done += read_range(handle, piece.offset + skip, target, digest)
                done += hash_range(handle, piece.offset + skip + target.nbytes, rest, digest, block)
                if done == num_bytes and digest.digest().hex() != piece.digest:
                    raise DamagedError(f"{path}: {label} was altered after it was written (its hash differs)")
                self._checked.add(key)
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read: {error.strerror}") from error
        if done != num_bytes:
            raise DamagedError(f"{path}: ends at byte {piece.offset + done:,}, it was truncated")

    def _open(self, name: str) -> int:
        """Open a file, or find it open; few stay open, however many ranks wrote."""
        if name not in self._handles:
            if len(self._handles) >= _OPEN_AT_MOST:
                os.close(self._handles.pop(next(iter(self._handles))))
            handle = self._handles[name] = open_regular(self._path / name)
            size, expected = os.fstat(handle).st_size, self._manifest.files[name].size_bytes
            if size != expected:
                raise DamagedError(f"{self._path / name}: has {size:,} bytes, the manifest says {expected:,}")
        return self._handles[name]
