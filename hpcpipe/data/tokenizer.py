"""From text to token ids and back."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpcpipe.errors import UsageError

_REPLACED = 0xFF  # never part of UTF-8, so it decodes to U+FFFD


@dataclass(frozen=True)
class ByteTokenizer:
    """Bytes as tokens: ids 0..255 are the bytes of UTF-8 text, one more id starts every document.

    Attributes
    ----------
    name : str
        How token files and checkpoints name this tokenizer.
    vocab : int
        Number of ids.
    separator : int
        The id that starts every document.
    separator_text : str
        What the separator is called; this text has no special meaning inside a document.
    """

    name: str = "bytes"
    vocab: int = 257
    separator: int = 256
    separator_text: str = "<|document|>"

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Turn text into ids, as the beginning of a document.

        Parameters
        ----------
        text : str
            Any text; bytes that a command line could not decode (surrogate escapes) become those bytes again.

        Returns
        -------
        ndarray of int32, shape [1 + number of UTF-8 bytes]
            The separator, then the bytes; owned by the caller.

        Raises
        ------
        UsageError
            The text holds a lone surrogate, which no UTF-8 stands for.
        """
        try:
            raw = text.encode("utf-8", errors="surrogateescape")
        except UnicodeEncodeError as error:
            raise UsageError(f"the text has no UTF-8 form: character {error.start} is a lone surrogate") from None
        ids = np.empty(1 + len(raw), dtype=np.int32)
        ids[0] = self.separator
        ids[1:] = np.frombuffer(raw, dtype=np.uint8)
        return ids

    def decode(self, ids: npt.ArrayLike) -> str:
        """Turn ids into text.

        Parameters
        ----------
        ids : array_like of int
            Token ids; may hold ids beyond the vocabulary, which a model with a padded vocabulary can produce.

        Returns
        -------
        str
            The text. A separator at the beginning is dropped, any other is shown as a newline; bytes that are no
            UTF-8 and ids beyond the vocabulary become U+FFFD.
        """
        values = np.asarray(ids, dtype=np.int64).ravel()
        if values.size and values[0] == self.separator:
            values = values[1:]
        values = np.where(values == self.separator, ord("\n"), values)
        values = np.where((values < 0) | (values > self.separator), _REPLACED, values)
        return values.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


_TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (ByteTokenizer(),)}


def tokenizer_named(name: str) -> ByteTokenizer:
    """Find a tokenizer by the name that token files and checkpoints carry.

    Parameters
    ----------
    name : str
        For example ``"bytes"``.

    Returns
    -------
    ByteTokenizer
        The tokenizer; it has no state.

    Raises
    ------
    UsageError
        This version of hpcpipe has no tokenizer of that name.
    """
    if name not in _TOKENIZERS:
        raise UsageError(f"unknown tokenizer {name!r}; this version of hpcpipe has: {', '.join(_TOKENIZERS)}")
    return _TOKENIZERS[name]
