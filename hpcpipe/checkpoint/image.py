"""Pieces of tensors to the bytes of an HDF5 file, in memory."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import h5py

from hpcpipe.checkpoint.layout import FORMAT, VERSION, Piece, new_hash


def build(step: int, pieces: Sequence[Piece]) -> tuple[memoryview, dict[str, Any]]:
    """Build the HDF5 file of one rank in memory.

    HDF5 never touches the disk: h5py can crash when a file system fills up under it, and an interrupted HDF5 file
    cannot be told from a finished one. HDF5's own memory driver would need twice the memory and leaves
    uninitialised memory in the gaps of the file; through a ``BytesIO`` equal pieces give equal bytes.

    Parameters
    ----------
    step : int
        The number of optimizer updates made.
    pieces : sequence of Piece
        At most one per kind and tensor. Their data are copied once.

    Returns
    -------
    image : memoryview of uint8
        The file, owned by the caller.
    tensors : dict
        JSON-able: tensor name to ``shape``, ``dtype`` and ``kinds``; a kind is a list of one dict with ``start``,
        ``stop``, ``offset`` (bytes from the start of the file) and ``blake2b`` (of the piece's bytes).

    Raises
    ------
    ValueError
        Two pieces of the same kind of the same tensor, or of different shape or dtype.
    """
    buffer = BytesIO()
    tensors: dict[str, Any] = {}
    # Metadata of format 1.10 carry checksums: other programs notice a damaged file too.
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, "step": step})
        for piece in pieces:
            # A piece without elements says nothing, unless the tensor itself has none.
            if piece.start < piece.stop or piece.is_whole:
                offset = _add(file, piece)
                _enter(tensors, piece, offset)
    return buffer.getbuffer(), tensors


def _add(file: h5py.File, piece: Piece) -> int:
    """Store one piece; return where its bytes begin in the file."""
    path = f"{piece.kind}/{piece.name}"
    if path in file:
        raise ValueError(f"{path}: written twice by one rank")
    data = piece.data.reshape(piece.shape if piece.is_whole else -1)
    dataset = file.create_dataset(path, data=data, track_times=False)
    if not piece.is_whole:
        dataset.attrs.update({"shape": piece.shape, "start": piece.start, "stop": piece.stop})
    offset = dataset.id.get_offset()
    if offset is None and data.size:
        raise RuntimeError(f"{path}: HDF5 did not store it in one range of the file")
    return int(offset or 0)


def _enter(tensors: dict[str, Any], piece: Piece, offset: int) -> None:
    """Enter one piece in the table that goes into the manifest."""
    shape, dtype = [int(extent) for extent in piece.shape], piece.data.dtype.name
    entry = tensors.setdefault(piece.name, {"shape": shape, "dtype": dtype, "kinds": {}})
    if (entry["shape"], entry["dtype"]) != (shape, dtype):
        raise ValueError(
            f"{piece.name}: {piece.kind} is {dtype} of shape {shape}, another kind {entry['dtype']} of shape "
            f"{entry['shape']}; all kinds of a tensor have one shape and dtype"
        )
    digest = new_hash()
    digest.update(piece.data.reshape(-1).view("uint8").data)
    entry["kinds"][piece.kind] = [
        {"start": int(piece.start), "stop": int(piece.stop), "offset": offset, "blake2b": digest.hexdigest()}
    ]
