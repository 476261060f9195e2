"""Making token files: read, sort by hash, drop duplicates, write under a temporary name, rename."""

import errno
import fcntl
import hashlib
import os
import platform
import re
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hpcpipe.data.format import BLOCK_BYTES, TOKEN, Contents, build_image, content_digest, document_hash
from hpcpipe.data.sources import STDLIB, Document, source_documents, source_files
from hpcpipe.data.tokenizer import ByteTokenizer
from hpcpipe.errors import DiskError, UsageError

Report = Callable[[str], None]

_TOKENIZER = ByteTokenizer()
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def prepare(sources: Sequence[str], path: Path, report: Report | None = None) -> None:
    """Make a token file; one that exists is replaced at the very end, in one step.

    The text is held in memory, one byte per byte. Documents without text are left out, and of documents whose bytes
    have the same hash the first is kept. The same text gives the same file, byte for byte.

    Parameters
    ----------
    sources : sequence of str
        What to read, see ``source_documents``.
    path : Path
        The file to make, in a folder that exists.
    report : callable, optional
        Told in one line what has been done.

    Raises
    ------
    UsageError
        A source is missing, no text is found, or the folder does not exist.
    DamagedError
        A source is not what its name says.
    DiskError
        The file system refused the file. Nothing is left behind.
    """
    path = Path(path)
    _check_target(path)
    documents = _collect(sources, report)
    with _exclusive(path) as temporary:
        _write(_describe(sources), documents, path, temporary)
    if report:
        report(f"wrote {path}: {len(documents)} documents, {path.stat().st_size / 1e6:.1f} MB")


def ensure_prepared(source: str, path: Path, report: Report | None = None) -> bool:
    """Make a token file unless it exists; of several processes that ask together one makes it, the others wait.

    Parameters
    ----------
    source : str
        What to read, see ``source_documents``.
    path : Path
        The file; its folder is made if need be. An existing file is taken as it is.
    report : callable, optional
        Told in one line what has been done.

    Returns
    -------
    bool
        True if this process made the file.

    Raises
    ------
    UsageError, DamagedError, DiskError
        As ``prepare``.
    """
    path = Path(path)
    if path.exists():
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{path.parent}: cannot be made: {error.strerror}") from None
    _check_target(path)
    with _exclusive(path) as temporary:
        if path.exists():
            return False
        if report:
            report(f"preparing {path} from {source}")
        documents = _collect([source], report)
        _write(_describe([source]), documents, path, temporary)
    return True


def default_path(source: str, directory: Path) -> Path:
    """Say where the token file of a source belongs when a configuration names no file.

    Parameters
    ----------
    source : str
        What to read, see ``source_documents``.
    directory : Path
        The folder of the runs.

    Returns
    -------
    Path
        ``<directory>/_tokens/stdlib-python<version>.h5`` for the standard library, else a name with a digest of the
        source's path and of its files' sizes and modification times: changed text gets another file.

    Raises
    ------
    UsageError
        The source is missing.
    """
    folder = Path(directory) / "_tokens"
    if source == STDLIB:
        return folder / f"stdlib-python{platform.python_version()}.h5"
    root = Path(source)
    state = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=8)
    for file in source_files(source):
        facts = file.stat()
        state.update(os.fsencode(file.relative_to(root)) + f"\0{facts.st_size} {facts.st_mtime_ns}\n".encode())
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", root.resolve().stem).strip("-")[:40] or "text"
    return folder / f"{stem}-{state.hexdigest()}.h5"


def _collect(sources: Sequence[str], report: Report | None) -> list[tuple[int, Document]]:
    """All documents with text, ordered by hash, without duplicates."""
    for source in sources:
        source_files(source)  # a missing source is refused before any other is read
    by_hash: dict[int, Document] = {}
    num_read = num_bytes = 0
    for source in sources:
        for document in source_documents(source):
            if document.text:
                num_read += 1
                num_bytes += len(document.text)
                by_hash.setdefault(document_hash(document.text), document)
    if not by_hash:
        raise UsageError(f"no text found in {_describe(sources)}")
    if report:
        dropped = num_read - len(by_hash)
        duplicates = f", dropped {dropped} duplicate{'s' * (dropped != 1)}" if dropped else ""
        report(f"read {num_read} documents, {num_bytes / 1e6:.1f} MB, from {_describe(sources)}{duplicates}")
    return sorted(by_hash.items())


def _describe(sources: Sequence[str]) -> str:
    """Name the sources in one line; a shell pattern can stand for thousands of files."""
    shown = [f"{STDLIB} of Python {platform.python_version()}" if name == STDLIB else name for name in sources[:4]]
    return ", ".join(shown) + (f" and {len(sources) - 4} more" if len(sources) > 4 else "")


def _check_target(path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file to write")


@contextmanager
def _exclusive(path: Path) -> Iterator[Path]:
    """Hold the lock beside a file, and give a temporary name in its folder that nobody else uses meanwhile."""
    # The short names leave room for file names of any length. The lock file stays: removing it would let a process
    # that waits for it and one that makes a new one both hold "the" lock. On some file systems a lock holds on one
    # machine only, hence the host; the worst case is that two machines make the same file and one rename wins.
    mark = f".hpcpipe-{zlib.crc32(os.fsencode(path.name)):08x}"
    try:
        with path.with_name(f"{mark}.lock").open("ab") as lock:
            owner = socket.gethostname()
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                owner += f"-{os.getpid()}"
            yield path.with_name(f"{mark}-{owner}.tmp")
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}") from None


def _write(source: str, documents: list[tuple[int, Document]], path: Path, temporary: Path) -> None:
    """Write the file, make sure that it is on disk, and give it its name."""
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


def _ends(
    lengths: "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
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
        pending += np.frombuffer(document.text, dtype=np.uint8).astype(TOKEN).tobytes()
        while len(pending) >= BLOCK_BYTES:
            yield bytes(pending[:BLOCK_BYTES])
            del pending[:BLOCK_BYTES]
    if pending:
        yield bytes(pending)
