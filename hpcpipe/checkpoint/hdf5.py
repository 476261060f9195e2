"""What HDF5 is asked for to make files of checkpoints: in memory, of format 1.10, without times."""

from typing import Any

import h5py
import numpy as np

from hpcpipe.checkpoint.layout import FORMAT, VERSION
from hpcpipe.checkpoint.sparse import SparseFile


def create(memory: SparseFile) -> h5py.File:
    """Begin a file, with the attributes of all files of a checkpoint; its step is 0 until `set_step`.

    HDF5 never touches the disk: h5py can crash when a file system fills up under it, and an interrupted HDF5 file
    cannot be told from a finished one.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, memory)
    # Metadata of format 1.10 carry checksums: other programs notice a damaged file too.
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    creation = without_times(h5py.h5p.FILE_CREATE)
    file = h5py.File(h5py.h5f.create(b"checkpoint", h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access))
    file.attrs.update({"format": FORMAT, "version": VERSION, "step": np.int64(0)})
    return file


def set_step(memory: SparseFile, step: int) -> None:
    """Set the step of a finished file; nothing else in it changes, or moves."""
    with h5py.File(memory, "r+", libver=("v110", "v110")) as file:
        file.attrs.modify("step", np.int64(step))


def add_dataset(file: h5py.File, path: str, dtype: str, space: Any, creation: Any) -> Any:
    """Add a dataset ``KIND/NAME``, and the groups that it lies in; `creation` comes from `without_times`."""
    *groups, name = path.split("/")
    place = file.id
    for group in groups:
        if group.encode() in place:
            place = h5py.h5g.open(place, group.encode())
        else:
            place = h5py.h5g.create(place, group.encode(), gcpl=without_times(h5py.h5p.GROUP_CREATE))
    elements = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    return h5py.Dataset(h5py.h5d.create(place, name.encode(), elements, space, creation))


def without_times(kind: Any) -> Any:
    """Return properties of a new object of HDF5 that keeps no times, so that equal states give equal files."""
    properties = h5py.h5p.create(kind)
    properties.set_obj_track_times(False)
    return properties


def space_of(shape: tuple[int, ...]) -> Any:
    """Return a dataspace."""
    return h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
