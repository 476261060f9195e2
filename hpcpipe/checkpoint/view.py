"""``view.h5``: the tensors of all ranks' files as one model, for programs that read HDF5. hpcpipe never reads it."""

import json
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any

import h5py
import numpy as np

from hpcpipe.checkpoint import hdf5
from hpcpipe.checkpoint.sparse import SparseFile

_ATTRIBUTE_BYTES_AT_MOST = 60_000

Block = tuple[tuple[int, ...], tuple[int, ...]]


def build(document: dict[str, Any]) -> bytes:
    """Build a file of virtual datasets over the files of a checkpoint.

    Every kind of every tensor is a dataset ``KIND/NAME`` of the tensor's shape, which takes its elements from the
    ranks' files beside it. Elements whose file is missing read as NaN, integers as 0.

    Parameters
    ----------
    document : dict
        What ``assemble`` returned. For the next document with the same tensors only the step is set anew.

    Returns
    -------
    bytes
        The file. Equal documents give equal bytes.
    """
    tensors = {
        name: {
            **entry,
            "kinds": {
                kind: [{key: piece[key] for key in ("file", "start", "stop")} for piece in pieces]
                for kind, pieces in entry["kinds"].items()
            },
        }
        for name, entry in document["tensors"].items()
    }
    model = document["header"].get("model")
    buffer = SparseFile()
    buffer.write(_build(json.dumps({"model": model, "tensors": tensors})))
    hdf5.set_step(buffer, document["step"])
    buffer.seek(0)
    return buffer.read() or b""


def blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Block]:
    """Cut a range of a tensor's elements into blocks that are boxes in its shape.

    Parameters
    ----------
    shape : tuple of int
        At least one dimension.
    start, stop : int
        The elements ``[start, stop)`` in C order, at least one.

    Yields
    ------
    (tuple of int, tuple of int)
        First index and extents of a block; in C order they are the range's elements one after the other. There are
        at most ``2 * len(shape) - 1``.
    """
    inner = prod(shape[1:])
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    first, last = -(-start // inner), stop // inner
    if first > last:
        yield from _inside(shape, first - 1, start, stop)
        return
    if start < first * inner:
        yield from _inside(shape, first - 1, start, first * inner)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * inner < stop:
        yield from _inside(shape, last, last * inner, stop)


def _inside(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Block]:
    """Cut a range that lies within one row of the first dimension."""
    before = row * prod(shape[1:])
    for first, extents in blocks(shape[1:], start - before, stop - before):
        yield (row, *first), (1, *extents)


@lru_cache(maxsize=1)
def _build(table: str) -> bytes:
    """Build the file of a table for step 0; a run has one table, so that the last is kept."""
    content = json.loads(table)
    buffer = SparseFile()
    with hdf5.create(buffer) as file:
        # HDF5 keeps an attribute within the header of its object, which has 64 KiB.
        model = json.dumps(content["model"], sort_keys=True)
        if len(model) <= _ATTRIBUTE_BYTES_AT_MOST:
            file.attrs["model"] = model
        for name, entry in content["tensors"].items():
            for kind, pieces in entry["kinds"].items():
                _add(file, f"{kind}/{name}", tuple(entry["shape"]), entry["dtype"], pieces)
    buffer.seek(0)
    return buffer.read() or b""


def _add(file: h5py.File, path: str, shape: tuple[int, ...], dtype: str, pieces: list[dict[str, Any]]) -> None:
    """Add the virtual dataset of one kind of one tensor."""
    creation = hdf5.without_times(h5py.h5p.DATASET_CREATE)
    if np.dtype(dtype).kind == "f":
        creation.set_fill_value(np.array(np.nan, dtype))
    for piece in pieces:
        if prod(shape):
            _map(creation, path, shape, piece)
    hdf5.add_dataset(file, path, dtype, hdf5.space_of(shape), creation)


def _map(creation: Any, path: str, shape: tuple[int, ...], piece: dict[str, Any]) -> None:
    """Say where the elements of one piece are."""
    start, stop, source = piece["start"], piece["stop"], piece["file"].encode()
    if stop - start == prod(shape):
        creation.set_virtual(hdf5.space_of(shape), source, f"/{path}".encode(), hdf5.space_of(shape))
        return
    done = 0
    for first, extents in blocks(shape, start, stop):
        there, here = hdf5.space_of((stop - start,)), hdf5.space_of(shape)
        there.select_hyperslab((done,), (1,), block=(prod(extents),))
        here.select_hyperslab(first, (1,) * len(shape), block=extents)
        creation.set_virtual(here, source, f"/{path}".encode(), there)
        done += prod(extents)
