"""The bytes of a rank's HDF5 file: those of the tensors where they lie, and around them what HDF5 keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py

from hpcpipe.checkpoint import hdf5
from hpcpipe.checkpoint.digests import DIGEST_BYTES, digest_key, digest_of, join
from hpcpipe.checkpoint.layout import PieceSpec
from hpcpipe.checkpoint.sparse import SparseFile


@dataclass(frozen=True)
class Region:
    """Neighbouring bytes of a file that are written and hashed together.

    Attributes
    ----------
    offset : int
        Byte of the file where they begin.
    buffer : memoryview of uint8
        The bytes, at least one: a piece's own buffer, which the caller owns, or HDF5's metadata.
    piece : int or None
        Number of the piece in the image's specs; None for metadata.
    """

    offset: int
    buffer: memoryview
    piece: int | None


class Image:
    """The layout of one rank's file, made once and used for every checkpoint.

    HDF5 lays the file out in a sparse file in memory, in which the tensors' bytes are holes; it never sees them. What
    it does not write is zero, so that equal pieces give equal bytes.

    Parameters
    ----------
    specs : sequence of PieceSpec
        At most one per kind and tensor.

    Attributes
    ----------
    specs : tuple of PieceSpec
    size_bytes : int
        Size of the file.

    Raises
    ------
    ValueError
        Two pieces of the same kind of the same tensor, or of different shape or dtype.
    """

    def __init__(self, specs: Sequence[PieceSpec]) -> None:
        self.specs = tuple(specs)
        _check_consistent(self.specs)
        self._file = SparseFile()
        with hdf5.create(self._file) as file:
            self._offsets = {number: _add(file, spec) for number, spec in enumerate(self.specs) if _is_held(spec)}
        self.size_bytes = self._file.size_bytes
        held = sorted((offset, number) for number, offset in self._offsets.items() if self.specs[number].num_bytes)
        self._extents = [(offset, offset + self.specs[number].num_bytes, number) for offset, number in held]

    def regions(self, step: int, data: Sequence[memoryview]) -> list[Region]:
        """Cover the file of a step exactly once.

        Parameters
        ----------
        step : int
            The number of optimizer updates made.
        data : sequence of memoryview
            The elements of each spec, contiguous; owned by the caller, not copied, and to be left alone as long as the
            regions are used.

        Returns
        -------
        list of Region
            In the order of the file.

        Raises
        ------
        ValueError
            A buffer has another size than its spec.
        """
        for spec, view in zip(self.specs, data, strict=True):
            if view.nbytes != spec.num_bytes or not view.c_contiguous:
                raise ValueError(f"{spec.label}: needs {spec.num_bytes} contiguous bytes, got {view.nbytes}")
        hdf5.set_step(self._file, step)
        regions: list[Region] = []
        done = 0
        for start, stop, number in [*self._extents, (self.size_bytes, self.size_bytes, -1)]:
            if done < start:
                self._file.seek(done)
                regions.append(Region(done, memoryview(self._file.read(start - done) or b""), None))
            if start < stop:
                regions.append(Region(start, data[number].cast("B"), number))
            done = stop
        if sum(region.buffer.nbytes for region in regions) != self.size_bytes:
            raise RuntimeError(f"HDF5 changed the size of the file from {self.size_bytes} bytes")
        return regions

    def record(self, name: str, step: int, regions: Sequence[Region], digests: Sequence[bytes]) -> dict[str, Any]:
        """Say what is in the file, for ``commit``.

        Parameters
        ----------
        name : str
            Name of the file in the checkpoint's directory.
        step : int
            The number of optimizer updates made.
        regions : sequence of Region
            What `regions` returned.
        digests : sequence of bytes
            BLAKE3 of each region.

        Returns
        -------
        dict
            JSON-able: ``step``; ``file`` with ``name``, ``bytes``, ``blake3`` and ``metadata``, a list of ``offset``,
            ``bytes`` and ``blake3``; ``tensors``, by name ``shape``, ``dtype`` and ``kinds``, of which each is a list
            of one piece with ``start``, ``stop``, ``offset`` and ``blake3``.
        """
        key = digest_key()
        if any(len(digest) != DIGEST_BYTES for digest in digests):
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes")
        found = {region.piece: digest for region, digest in zip(regions, digests, strict=True)}
        metadata = [
            {"offset": region.offset, "bytes": region.buffer.nbytes, key: digest.hex()}
            for region, digest in zip(regions, digests, strict=True)
            if region.piece is None
        ]
        tensors: dict[str, Any] = {}
        for number, offset in self._offsets.items():
            spec = self.specs[number]
            entry = tensors.setdefault(spec.name, {"shape": list(spec.shape), "dtype": spec.dtype, "kinds": {}})
            digest = found[number] if spec.num_bytes else digest_of(b"")
            piece = {"start": spec.start, "stop": spec.stop, "offset": offset, key: digest.hex()}
            entry["kinds"][spec.kind] = [piece]
        file = {"name": name, "bytes": self.size_bytes, key: join(digests).hex(), "metadata": metadata}
        return {"step": step, "file": file, "tensors": tensors}


def _is_held(spec: PieceSpec) -> bool:
    """Tell whether a piece says anything: one without elements does only if the tensor has none either."""
    return spec.start < spec.stop or spec.is_whole


def _check_consistent(specs: Sequence[PieceSpec]) -> None:
    """Refuse pieces that no file can hold together, before HDF5 is asked."""
    tensors: dict[str, PieceSpec] = {}
    paths: set[str] = set()
    for spec in filter(_is_held, specs):
        path = f"{spec.kind}/{spec.name}"
        if path in paths:
            raise ValueError(f"{path}: written twice by one rank")
        paths.add(path)
        first = tensors.setdefault(spec.name, spec)
        if (first.shape, first.dtype) != (spec.shape, spec.dtype):
            raise ValueError(
                f"{spec.name}: {spec.kind} is {spec.dtype} of shape {list(spec.shape)}, another kind {first.dtype} of"
                f" shape {list(first.shape)}; all kinds of a tensor have one shape and dtype"
            )


def _add(file: h5py.File, spec: PieceSpec) -> int:
    """Reserve the place of one piece; return where its bytes begin in the file."""
    path = f"{spec.kind}/{spec.name}"
    creation = hdf5.without_times(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    shape = spec.shape if spec.is_whole else (spec.size,)
    dataset = hdf5.add_dataset(file, path, spec.dtype, hdf5.space_of(shape), creation)
    if not spec.is_whole:
        dataset.attrs.update({"shape": spec.shape, "start": spec.start, "stop": spec.stop})
    offset = dataset.id.get_offset()
    if spec.num_bytes and (offset is None or dataset.id.get_storage_size() != spec.num_bytes):
        raise RuntimeError(f"{path}: HDF5 did not give it one range of the file")
    return int(offset or 0)
