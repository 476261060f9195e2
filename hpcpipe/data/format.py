"""What a token file contains: the HDF5 layout of docs/run-files.md in one place."""

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

FORMAT = "hpcpipe-tokens"
VERSION = 1
BLOCK_BYTES = 1 << 20
TOKEN = np.dtype("<u2")
BLOCK_TOKENS = BLOCK_BYTES // TOKEN.itemsize

CURE = "make it again: hpcpipe data prepare SOURCE... -o {path} --force"
OTHER_KIND = "name a file that `hpcpipe data prepare` made"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Everything in a token file but the tokens; the fields have the names they have in the file.

    Attributes
    ----------
    source : str
        What the file was prepared from, for people.
    tokenizer : str
        Name of the tokenizer.
    vocab, separator : int
        Number of ids, and the id that starts every document.
    text_bytes : int
        Bytes of text: tokens without the separators.
    document_offsets : ndarray of uint64, shape [D + 1]
        Where each document starts, in tokens; the last entry is the number of tokens.
    document_hash : ndarray of uint64, shape [D]
        BLAKE2b-64 of each document's bytes, strictly ascending.
    document_name_offsets : ndarray of uint64, shape [D + 1]
        Where each name starts in ``document_names``.
    document_names : ndarray of uint8
        The names, end to end.
    block_crc32 : ndarray of uint32
        CRC-32 of each block of ``BLOCK_BYTES`` of token data, the last block being shorter.
    digest : str
        BLAKE2b-256 that identifies what a model sees: tokenizer, documents and tokens.
    """

    source: str
    tokenizer: str
    vocab: int
    separator: int
    text_bytes: int
    document_offsets: npt.NDArray[np.uint64]
    document_hash: npt.NDArray[np.uint64]
    document_name_offsets: npt.NDArray[np.uint64]
    document_names: npt.NDArray[np.uint8]
    block_crc32: npt.NDArray[np.uint32]
    digest: str

    @property
    def num_tokens(self) -> int:
        """Number of tokens, separators included."""
        return int(self.document_offsets[-1])

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_hash)

    def attributes(self) -> dict[str, str | int]:
        """Return the values that the file keeps as HDF5 attributes, by name, without the checksum of them."""
        return {
            "source": self.source,
            "tokenizer": self.tokenizer,
            "vocab": self.vocab,
            "separator": self.separator,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "text_bytes": self.text_bytes,
            "block_bytes": BLOCK_BYTES,
            "digest": self.digest,
        }

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that the file keeps as HDF5 datasets beside ``tokens``, by name, little-endian."""
        return {name: getattr(self, name).astype(kind, copy=False) for name, kind in ARRAYS.items()}

    def metadata_crc32(self) -> int:
        """Return the CRC-32 of all attributes and arrays, in the order of ``attributes`` and ``arrays``."""
        crc = 0
        for name, value in self.attributes().items():
            crc = zlib.crc32(f"{name}={value}\n".encode("utf-8", "surrogateescape"), crc)
        for values in self.arrays().values():
            crc = zlib.crc32(np.ascontiguousarray(values).data, crc)
        return crc


ARRAYS = {
    "document_offsets": "<u8",
    "document_hash": "<u8",
    "document_name_offsets": "<u8",
    "document_names": "u1",
    "block_crc32": "<u4",
}


def document_hash(text: bytes) -> int:
    """Return the 64-bit BLAKE2b hash of a document's bytes, as an unsigned integer."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def content_digest(
    tokenizer: str,
    vocab: int,
    separator: int,
    document_offsets: npt.NDArray[np.uint64],
    blocks: Iterable[bytes | memoryview],
) -> str:
    """Compute the digest that identifies what a model sees of a token file.

    Names of documents and of the source are left out: the same text found elsewhere has the same digest.

    Parameters
    ----------
    tokenizer, vocab, separator, document_offsets
        As in ``Contents``.
    blocks : iterable of bytes or memoryview
        The token data in order, little-endian, in pieces of any size.

    Returns
    -------
    str
        BLAKE2b-256 as 64 hexadecimal digits.
    """
    digest = hashlib.blake2b(f"{FORMAT} {VERSION} {tokenizer} {vocab} {separator}\n".encode(), digest_size=32)
    digest.update(np.uint64(len(document_offsets)).astype("<u8").tobytes())
    digest.update(np.ascontiguousarray(document_offsets, dtype="<u8").data)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def build_image(contents: Contents, image: BinaryIO) -> int:
    """Write the HDF5 file without its tokens into a sparse file.

    Parameters
    ----------
    contents : Contents
        Everything but the tokens.
    image : binary file open for reading and writing
        Empty and sparse, so that the hole where the tokens belong takes no space.

    Returns
    -------
    int
        Byte position of the first token. The ``2 * num_tokens`` bytes from there on are unwritten.
    """
    # Since 1.10 HDF5 puts checksums on its own structures; aligned to 8 bytes the tokens are aligned to theirs.
    with h5py.File(image, "w", libver=("v110", "v110"), alignment_threshold=1, alignment_interval=8) as file:
        file.attrs["format"] = _attribute(FORMAT)
        file.attrs["version"] = _attribute(VERSION)
        for name, value in contents.attributes().items():
            file.attrs[name] = _attribute(value)
        file.attrs["metadata_crc32"] = _attribute(contents.metadata_crc32())
        for name, values in contents.arrays().items():
            file.create_dataset(name, data=values)
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        properties.set_obj_track_times(False)
        space = h5py.h5s.create_simple((contents.num_tokens,))
        tokens = h5py.h5d.create(file.id, b"tokens", h5py.h5t.STD_U16LE, space, properties)
        return int(tokens.get_offset())


def _attribute(value: str | int) -> Any:
    """Texts as fixed-length bytes: variable-length ones live in a heap that HDF5 does not checksum."""
    return np.bytes_(value.encode("utf-8", "surrogateescape")) if isinstance(value, str) else np.uint64(value)
