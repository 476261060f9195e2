"""Where text comes from: the standard library, text files, folders and JSON lines, always in the same order."""

import json
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hpcpipe.errors import DamagedError, DiskError, UsageError

STDLIB = "stdlib"

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """A piece of text that is kept whole.

    Attributes
    ----------
    name : str
        Where it was found, relative to its source.
    text : bytes
        UTF-8.
    """

    name: str
    text: bytes


def source_files(source: str) -> list[Path]:
    """List the files of a source.

    Parameters
    ----------
    source : str
        ``stdlib``, or the path of a text file, a folder or a ``.jsonl`` file. Write ``./stdlib`` for a file of that
        name.

    Returns
    -------
    list of Path
        Regular files, in byte order of their paths within the source. In folders hidden files and folders are left
        out, and links to folders are not followed.

    Raises
    ------
    UsageError
        Nothing has that path, or it is neither a file nor a folder, or may not be read.
    """
    if source == STDLIB:
        return [path for path in _walk(_stdlib_root(), _NOT_LIBRARY) if _belongs_to_library(path)]
    root = Path(source)
    try:
        mode = root.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"source {source!r}: no such file or folder; it may also be {STDLIB!r}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"source {source!r} cannot be read: {error}") from None
    if stat.S_ISDIR(mode):
        return _walk(root)
    if stat.S_ISREG(mode):
        return [root]
    raise UsageError(f"source {source!r}: neither a file nor a folder")


def source_documents(source: str) -> Iterator[Document]:
    """Read the documents of a source.

    Parameters
    ----------
    source : str
        As for ``source_files``. A file is a document; in a ``.jsonl`` file every line is one, with its text under
        the key ``text``. Inside folders and the standard library, files that are no UTF-8 text are left out.

    Yields
    ------
    Document
        In the order of ``source_files``; empty ones too.

    Raises
    ------
    UsageError
        As for ``source_files``.
    DamagedError
        A file that was asked for by name is no UTF-8 text, or a line of a ``.jsonl`` file is malformed.
    DiskError
        A file could not be read.
    """
    files = source_files(source)
    root = _stdlib_root() if source == STDLIB else Path(source)
    named = files == [root]
    for path in files:
        name = path.name if named else f"{STDLIB if source == STDLIB else root.resolve().name}/{path.relative_to(root)}"
        raw = _read(path)
        if path.suffix == ".jsonl":
            yield from _json_lines(path, name, raw)
            continue
        problem = _not_text(raw)
        if not problem:
            yield Document(name, raw)
        elif named:
            raise DamagedError(f"{path}: not text: {problem}; convert it to UTF-8 first")


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _belongs_to_library(path: Path) -> bool:
    """Take Python sources, but for the two that differ with the machine that built the interpreter."""
    generated = path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-")
    return path.suffix == ".py" and not generated


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> list[Path]:
    """List regular files below a folder that are not hidden, in byte order of their paths."""

    def refuse(error: OSError) -> NoReturn:
        raise UsageError(f"{error.filename}: cannot be read: {error.strerror}") from None

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    try:
        files = [path for path in found if path.is_file()]
    except OSError as error:
        refuse(error)
    return sorted(files, key=lambda path: os.fsencode(path.relative_to(root)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (PermissionError, FileNotFoundError) as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except OSError as error:
        raise DiskError(f"{path}: cannot be read: {error.strerror}") from None


def _not_text(raw: bytes) -> str:
    """Say why bytes are no text, or nothing."""
    if b"\0" in raw:
        return f"byte {raw.index(0)} is zero"
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start} ({raw[error.start]:#04x}) is not UTF-8"
    return ""


def _json_lines(path: Path, name: str, raw: bytes) -> Iterator[Document]:
    """One document per line that is not blank."""
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise DamagedError(f'{path}:{number}: expected an object with a string under "text"')
        try:
            yield Document(f"{name}:{number}", entry["text"].encode("utf-8"))
        except UnicodeEncodeError:
            raise DamagedError(f'{path}:{number}: "text" holds a lone surrogate, which is not Unicode text') from None
