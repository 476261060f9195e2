"""Reading token files: memory-mapped tokens whose blocks are checked when they are first touched."""

import math
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from hpcpipe.data.format import BLOCK_TOKENS, CURE, OTHER_KIND, TOKEN, Contents
from hpcpipe.data.load import read_contents
from hpcpipe.errors import DamagedError, UsageError

Tokens = npt.NDArray[np.uint16]


class TokenFile:
    """An open token file. Any number of processes may read one at the same time.

    Everything but the tokens is read and checked here; of the file only the memory map of the tokens stays.

    Parameters
    ----------
    path : Path
        A file made by ``hpcpipe data prepare``.

    Attributes
    ----------
    path : Path
        The file.
    vocab : int
        Number of token ids.
    separator : int
        The id that starts every document.
    num_tokens, num_documents, text_bytes : int
        Tokens with separators, documents, and bytes of text (tokens without separators).
    digest : str
        Identifies tokenizer, documents and tokens.
    tokenizer, source : str
        Name of the tokenizer, and what the file was prepared from.

    Raises
    ------
    DamagedError
        The file is missing, truncated, altered, or of another kind or version.
    UsageError
        The file may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        contents, mapped = _open(self.path)
        self.vocab = contents.vocab
        self.separator = contents.separator
        self.num_tokens = contents.num_tokens
        self.num_documents = contents.num_documents
        self.text_bytes = contents.text_bytes
        self.digest = contents.digest
        self.tokenizer = contents.tokenizer
        self.source = contents.source
        self.document_offsets = contents.document_offsets
        self.document_hash = contents.document_hash
        self._tokens_at = mapped.offset
        self._tokens: Tokens | None = mapped.view(np.ndarray)
        self._block_crc32 = contents.block_crc32
        self._checked = np.zeros(len(contents.block_crc32), dtype=np.bool_)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory map; views that ``read`` returned keep it alive."""
        self._tokens = None

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens, checking each block of the file the first time it is touched.

        Parameters
        ----------
        start, stop : int
            Token positions, ``0 <= start <= stop <= num_tokens``.

        Returns
        -------
        ndarray of uint16, shape [stop - start]
            A read-only view of the memory map.

        Raises
        ------
        DamagedError
            A block does not have the checksum that it was written with.
        ValueError
            The range is outside the file, or the file is closed.
        """
        if self._tokens is None:
            raise ValueError(f"{self.path} is closed")
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens {start}..{stop} are outside {self.path}, which has {self.num_tokens}")
        for block in range(start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)):
            if not self._checked[block]:
                problem = self.block_problem(block)
                if problem:
                    raise DamagedError(f"{self.path}: {problem}; {CURE.format(path=self.path)}")
                self._checked[block] = True
        return self._tokens[start:stop]

    @property
    def num_blocks(self) -> int:
        """Number of checksummed blocks."""
        return len(self._block_crc32)

    def block_problem(self, block: int) -> str:
        """Compare a block of tokens with its checksum.

        Parameters
        ----------
        block : int
            Number of the block, below ``num_blocks``.

        Returns
        -------
        str
            Where the file is damaged, in bytes from its beginning; empty if it is not.
        """
        if self._tokens is None:
            raise ValueError(f"{self.path} is closed")
        data = self._tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
        found, expected = zlib.crc32(data.data), int(self._block_crc32[block])
        if found == expected:
            return ""
        first = self._tokens_at + block * BLOCK_TOKENS * TOKEN.itemsize
        return (
            f"damaged between byte {first} and byte {first + data.nbytes}: "
            f"checksum {found:#010x}, expected {expected:#010x}"
        )

    def split(self, validation_fraction: float) -> "tuple[TokenRange, TokenRange]":
        """Divide the documents into those to train on and those held out.

        Held out are the documents whose hash is below ``validation_fraction * 2**64``: whether a document is held
        out depends on its own bytes only. With two documents or more and a fraction above 0 each side gets at least
        one; a single document is trained on.

        Parameters
        ----------
        validation_fraction : float
            At least 0 and below 1.

        Returns
        -------
        train, validation : TokenRange
            Contiguous ranges; the held-out one comes first in the file, and may be empty.

        Raises
        ------
        UsageError
            The fraction is out of range.
        """
        if not 0.0 <= validation_fraction < 1.0:
            raise UsageError(f"validation_fraction must be at least 0 and below 1, not {validation_fraction}")
        threshold = np.uint64(math.ceil(math.ldexp(validation_fraction, 64)))
        num_held_out = int(np.searchsorted(self.document_hash, threshold, side="left"))
        at_least = 1 if validation_fraction > 0.0 and self.num_documents > 1 else 0
        num_held_out = min(max(num_held_out, at_least), self.num_documents - 1)
        boundary = int(self.document_offsets[num_held_out])
        train = TokenRange(self, boundary, self.num_tokens, self.num_documents - num_held_out)
        return train, TokenRange(self, 0, boundary, num_held_out)


@dataclass(frozen=True)
class TokenRange:
    """Whole documents that lie one after the other in a token file.

    Attributes
    ----------
    file : TokenFile
        The file, which must stay open.
    start, stop : int
        Token positions in the file.
    num_documents : int
        Documents in the range.
    """

    file: TokenFile
    start: int
    stop: int
    num_documents: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the range, separators included."""
        return self.stop - self.start

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens by positions within the range; see ``TokenFile.read``."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens {start}..{stop} are outside a range of {self.num_tokens}")
        return self.file.read(self.start + start, self.start + stop)


def document_names(path: Path, limit: int) -> list[str]:
    """Read the names of the first documents of a token file.

    Parameters
    ----------
    path : Path
        The token file.
    limit : int
        At most so many names.

    Returns
    -------
    list of str
        Names in the order of the file; bytes that are no UTF-8 are surrogate escapes.

    Raises
    ------
    DamagedError, UsageError
        As ``TokenFile``.
    """
    contents, _ = _open(Path(path))
    ends = contents.document_name_offsets[: limit + 1].tolist()
    blob = contents.document_names[: ends[-1]].tobytes()
    return [blob[start:stop].decode("utf-8", "surrogateescape") for start, stop in pairwise(ends)]


def _open(path: Path) -> "tuple[Contents, np.memmap[tuple[int, ...], np.dtype[np.uint16]]]":
    """Read the contents and map the tokens through one descriptor, so that both are of the same file."""
    try:
        with path.open("rb") as stream:
            contents, tokens_at = read_contents(stream, path)
            tokens = np.memmap(stream, dtype=TOKEN, mode="r", offset=tokens_at, shape=(contents.num_tokens,))
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path}: no such token file; make it: hpcpipe data prepare SOURCE... -o {path}") from None
    except IsADirectoryError:
        raise DamagedError(f"{path}: not a token file: it is a folder; {OTHER_KIND}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    return contents, tokens
