"""Making token files: read, sort by hash, drop duplicates, write."""

import hashlib
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hpcpipe.data.format import document_hash
from hpcpipe.data.sources import STDLIB, Document, source_documents, source_files
from hpcpipe.data.write import exclusive, write_documents
from hpcpipe.errors import DiskError, UsageError

Report = Callable[[str], None]


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
        A source is missing, no text is found, the folder does not exist, or the path is a device or pipe.
    DamagedError
        A source is not what its name says.
    DiskError
        The file system refused the file. Nothing is left behind.
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))  # the link stays, what it leads to is replaced
    _check_target(path)
    documents = _collect(sources, report)
    with exclusive(path) as temporary:
        write_documents(_describe(sources), documents, path, temporary)
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
    with exclusive(path) as temporary:
        if path.exists():
            return False
        if report:
            report(f"preparing {path} from {source}")
        documents = _collect([source], report)
        write_documents(_describe([source]), documents, path, temporary)
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
        if len(by_hash) == 1:
            report("a single document is trained on whole: with two or more, some can be held out")
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
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is not a regular file, and is not replaced; name another file to write")
