"""What a token file contains, and how that is checked: the HDF5 layout of docs/file-formats.md in one place."""

import hashlib
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from hpcpipe.errors import DamagedError

FORMAT = "hpcpipe-tokens"
VERSION = 1
BLOCK_BYTES = 1 << 20
TOKEN = np.dtype("<u2")
BLOCK_TOKENS = BLOCK_BYTES // TOKEN.itemsize

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK_BYTES = 48
CURE = "make it again: hpcpipe data prepare SOURCE... -o {path} --force"


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
        return {name: getattr(self, name).astype(kind, copy=False) for name, kind in _ARRAYS.items()}

    def metadata_crc32(self) -> int:
        """Return the CRC-32 of all attributes and arrays, in the order of ``attributes`` and ``arrays``."""
        crc = 0
        for name, value in self.attributes().items():
            crc = zlib.crc32(f"{name}={value}\n".encode("utf-8", "surrogateescape"), crc)
        for values in self.arrays().values():
            crc = zlib.crc32(np.ascontiguousarray(values).data, crc)
        return crc


_ARRAYS = {
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


def read_contents(stream: BinaryIO, path: Path) -> tuple[Contents, int]:
    """Read and check everything in a token file but the tokens.

    Parameters
    ----------
    stream : binary file open for reading
        The token file; stays open and is owned by the caller.
    path : Path
        Its name, for messages.

    Returns
    -------
    contents : Contents
        What the file says.
    tokens_at : int
        Byte position of the first token.

    Raises
    ------
    DamagedError
        The file is truncated, altered, of another kind or of another version.
    """
    _check_length(stream, path)
    try:
        with h5py.File(stream, "r") as file:
            _check_kind(file, path)
            contents = Contents(
                source=_text(file, "source"),
                tokenizer=_text(file, "tokenizer"),
                vocab=int(file.attrs["vocab"]),
                separator=int(file.attrs["separator"]),
                text_bytes=int(file.attrs["text_bytes"]),
                digest=_text(file, "digest"),
                **{name: file[name][:].astype(np.dtype(kind).newbyteorder("=")) for name, kind in _ARRAYS.items()},
            )
            stored_crc = int(file.attrs["metadata_crc32"])
            tokens = file["tokens"]
            tokens_at, num_stored, kind = tokens.id.get_offset(), tokens.shape, tokens.dtype
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, UnicodeError, AttributeError) as error:
        raise DamagedError(f"{path}: damaged: HDF5 cannot read it ({error}); {CURE.format(path=path)}") from None
    problem = _inconsistency(contents, stored_crc, tokens_at, num_stored, kind, os.fstat(stream.fileno()).st_size)
    if problem:
        raise DamagedError(f"{path}: damaged: {problem}; {CURE.format(path=path)}")
    return contents, int(tokens_at)


def _attribute(value: str | int) -> Any:
    """Texts as fixed-length bytes: variable-length ones live in a heap that HDF5 does not checksum."""
    return np.bytes_(value.encode("utf-8", "surrogateescape")) if isinstance(value, str) else np.uint64(value)


def _text(file: h5py.File, name: str) -> str:
    return bytes(file.attrs[name]).decode("utf-8", "surrogateescape")


def _check_length(stream: BinaryIO, path: Path) -> None:
    """Compare the length with the one in the superblock, which HDF5 writes into bytes 28..35 since 1.10."""
    stream.seek(0)
    head = stream.read(_SUPERBLOCK_BYTES)
    stream.seek(0)
    found = os.fstat(stream.fileno()).st_size
    if head[:8] != _SIGNATURE[: len(head)]:
        raise DamagedError(f"{path}: not a token file: it is not HDF5; {CURE.format(path=path)}")
    expected = _SUPERBLOCK_BYTES
    if len(head) == _SUPERBLOCK_BYTES and head[8] in (2, 3) and head[9] == 8:
        expected = int.from_bytes(head[28:36], "little")
    if found < expected:
        least = "" if len(head) == _SUPERBLOCK_BYTES else "at least "
        raise DamagedError(
            f"{path}: truncated: expected {least}{expected} bytes, found {found}; {CURE.format(path=path)}"
        )


def _check_kind(file: h5py.File, path: Path) -> None:
    if "format" not in file.attrs or _text(file, "format") != FORMAT:
        raise DamagedError(f"{path}: not a token file: its format is not {FORMAT!r}; {CURE.format(path=path)}")
    version = int(file.attrs["version"])
    if version != VERSION:
        raise DamagedError(
            f"{path}: version {version} of {FORMAT}, this hpcpipe reads version {VERSION}; use the hpcpipe that "
            f"wrote it, or {CURE.format(path=path)}"
        )


def _inconsistency(
    contents: Contents,
    stored_crc: int,
    tokens_at: int | None,
    shape: tuple[int, ...],
    kind: np.dtype[Any],
    file_bytes: int,
) -> str:
    """Say what is wrong with sizes and checksums, or nothing."""
    offsets, hashes, names = contents.document_offsets, contents.document_hash, contents.document_name_offsets
    if len(hashes) < 1 or len(offsets) != len(hashes) + 1 or len(names) != len(hashes) + 1:
        return f"{len(hashes)} hashes need one more offset, found {len(offsets)} and {len(names)} for names"
    crc = contents.metadata_crc32()
    if crc != stored_crc:
        return f"checksum of offsets, hashes and names is {crc:#010x}, expected {stored_crc:#010x}"
    if kind != TOKEN or tokens_at is None:
        return f"tokens must be contiguous, unfiltered and of type {TOKEN}, found {kind}"
    if shape != (contents.num_tokens,):
        return f"document offsets end at {contents.num_tokens} tokens, found {shape}"
    if tokens_at + contents.num_tokens * TOKEN.itemsize > file_bytes:
        return f"tokens end at byte {tokens_at + contents.num_tokens * TOKEN.itemsize} of {file_bytes}"
    if offsets[0] != 0 or not (offsets[1:] > offsets[:-1]).all():
        return "document offsets do not ascend from 0"
    if not (hashes[1:] > hashes[:-1]).all():
        return "document hashes do not ascend"
    num_blocks = -(-contents.num_tokens // BLOCK_TOKENS)
    if len(contents.block_crc32) != num_blocks:
        return f"{num_blocks} blocks of tokens need as many checksums, found {len(contents.block_crc32)}"
    if names[0] != 0 or names[-1] != len(contents.document_names) or not (names[1:] >= names[:-1]).all():
        return "name offsets do not ascend from 0 to the length of the names"
    return ""
