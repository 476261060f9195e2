"""Reading the head of a token file, and refusing a file that is not what it should be."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from hpcpipe.data.format import ARRAYS, BLOCK_TOKENS, CURE, FORMAT, OTHER_KIND, TOKEN, VERSION, Contents
from hpcpipe.errors import DamagedError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK_BYTES = 48


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
                **{name: file[name][:].astype(np.dtype(kind).newbyteorder("=")) for name, kind in ARRAYS.items()},
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


def _text(file: h5py.File, name: str) -> str:
    return bytes(file.attrs[name]).decode("utf-8", "surrogateescape")


def _check_length(stream: BinaryIO, path: Path) -> None:
    """Compare the length with the one in the superblock, which HDF5 writes into bytes 28..35 since 1.10."""
    stream.seek(0)
    head = stream.read(_SUPERBLOCK_BYTES)
    stream.seek(0)
    found = os.fstat(stream.fileno()).st_size
    if head[:8] != _SIGNATURE[: len(head)]:
        raise DamagedError(f"{path}: not a token file: it is not HDF5; {OTHER_KIND}")
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
        raise DamagedError(f"{path}: not a token file: its format is not {FORMAT!r}; {OTHER_KIND}")
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
