"""Writing a token file: by one process at a time, under a temporary name, synced and renamed."""

import errno
import fcntl
import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from hpcpipe.data.format import BLOCK_BYTES, BLOCK_TOKENS, TOKEN, Contents, build_image, content_digest
from hpcpipe.data.sources import Document
from hpcpipe.data.tokenizer import ByteTokenizer
from hpcpipe.errors import DiskError

_TOKENIZER = ByteTokenizer()
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

UInt64 = npt.NDArray[np.uint64]


@contextmanager
def exclusive(path: Path) -> Iterator[Path]:
    """Hold the lock of a file that is to be made; others who ask wait.

    Parameters
    ----------
    path : Path
        The file, in a folder that exists.

    Yields
    ------
    Path
        A temporary name in the same folder, which nobody else uses meanwhile.

    Raises
    ------
    DiskError
        The file system refused the lock, or anything that was tried inside.
    """
    # The short names leave room for file names of any length. On some file systems a lock holds on one machine
    # only, hence the host; the worst case is that two machines make the same file and one rename wins.
    mark = f".hpcpipe-{zlib.crc32(os.fsencode(path.name)):08x}"
    lock_path = path.with_name(f"{mark}.lock")
    try:
        with ExitStack() as held:
            while True:
                lock = held.enter_context(lock_path.open("ab"))
                locked = _lock(lock)
                if not locked or _is_still(lock_path, lock):
                    break
                held.pop_all().close()
            held.callback(lock_path.unlink, missing_ok=True)
            owner = socket.gethostname() + ("" if locked else f"-{os.getpid()}")
            yield path.with_name(f"{mark}-{owner}.tmp")
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}") from None


def _lock(file: BinaryIO) -> bool:
    """Wait for a lock that ends with the process at the latest; False where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_still(path: Path, file: BinaryIO) -> bool:
    """Say whether a path names an open file: whoever held the lock before removed the file they locked."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def write_documents(source: str, documents: list[tuple[int, Document]], path: Path, temporary: Path) -> None:
    """Write a token file, make sure that it is on disk, and give it its name.

    Parameters
    ----------
    source : str
        What the file is prepared from, for people.
    documents : list of (int, Document)
        Hashes and documents, ordered by hash, no hash twice.
    path, temporary : Path
        The file to make, and the name that it has before it is complete, in the same folder.

    Raises
    ------
    OSError
        The file system refused; nothing is left behind.
    """
    contents = _contents(source, documents)
    try:
        with os.fdopen(os.memfd_create("hpcpipe-tokens"), "w+b") as image, temporary.open("wb") as file:
            tokens_at = build_image(contents, image)
            image.seek(0)
            file.write(image.read(tokens_at))
            for block in _token_blocks(documents):
                file.write(block)
            image.seek(tokens_at + contents.num_tokens * TOKEN.itemsize)
            file.write(image.read())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, *_NO_LOCKS):  # some network file systems have no such call
            raise
    finally:
        os.close(descriptor)


def _contents(source: str, documents: list[tuple[int, Document]]) -> Contents:
    """Everything but the tokens."""
    lengths = np.array([1 + len(document.text) for _, document in documents], dtype=np.uint64)
    names = [document.name.encode("utf-8", "surrogateescape") for _, document in documents]
    offsets = _ends(lengths)
    identity = (_TOKENIZER.name, _TOKENIZER.vocab, _TOKENIZER.separator, offsets)
    return Contents(
        source=source,
        tokenizer=_TOKENIZER.name,
        vocab=_TOKENIZER.vocab,
        separator=_TOKENIZER.separator,
        text_bytes=int(offsets[-1]) - len(documents),
        document_offsets=offsets,
        document_hash=np.array([key for key, _ in documents], dtype=np.uint64),
        document_name_offsets=_ends(np.array([len(name) for name in names], dtype=np.uint64)),
        document_names=np.frombuffer(b"".join(names), dtype=np.uint8),
        block_crc32=np.array([zlib.crc32(block) for block in _token_blocks(documents)], dtype=np.uint32),
        digest=content_digest(*identity, _token_blocks(documents)),
    )


def _ends(lengths: UInt64) -> UInt64:
    """Offsets of pieces that lie end to end: 0, and where each piece ends."""
    ends = np.zeros(len(lengths) + 1, dtype=np.uint64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def _token_blocks(documents: list[tuple[int, Document]]) -> Iterator[bytes]:
    """Token data in the blocks that have a checksum each."""
    separator = np.array([_TOKENIZER.separator], dtype=TOKEN).tobytes()
    pending = bytearray()
    for _, document in documents:
        pending += separator
        for start in range(0, len(document.text), BLOCK_TOKENS):
            text = np.frombuffer(document.text[start : start + BLOCK_TOKENS], dtype=np.uint8)
            pending += text.astype(TOKEN).tobytes()
            while len(pending) >= BLOCK_BYTES:
                yield bytes(pending[:BLOCK_BYTES])
                del pending[:BLOCK_BYTES]
    if pending:
        yield bytes(pending)
