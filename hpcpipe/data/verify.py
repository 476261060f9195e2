"""Checking a whole token file, down to every byte of text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hpcpipe.data.format import BLOCK_TOKENS, content_digest, document_hash
from hpcpipe.data.reader import TokenFile, Tokens
from hpcpipe.errors import DamagedError

_MAX_PROBLEMS = 20


def verify(path: Path) -> list[str]:
    """Recompute everything in a token file that can be recomputed.

    Parameters
    ----------
    path : Path
        The token file.

    Returns
    -------
    list of str
        What is wrong, at most 20 entries; empty if the file is as it was written.

    Raises
    ------
    UsageError
        The file may not be read.
    """
    try:
        with TokenFile(path) as file:
            problems = [problem for block in range(file.num_blocks) if (problem := file.block_problem(block))]
            if problems:
                problems = [f"{path}: {problem}" for problem in problems]
            else:
                problems = [f"{path}: {problem}" for problem in _content_problems(file)]
    except DamagedError as error:
        return [str(error)]
    if len(problems) > _MAX_PROBLEMS:
        more = len(problems) - _MAX_PROBLEMS + 1
        problems = [*problems[: _MAX_PROBLEMS - 1], f"{path}: {more} more problems"]
    return problems


def _content_problems(file: TokenFile) -> Iterator[str]:
    """Compare documents and digest with the tokens, whose checksums are right."""
    starts = file.document_offsets[:-1]
    separators = np.concatenate(
        [np.flatnonzero(block == file.separator).astype(np.uint64) + np.uint64(at) for at, block in _blocks(file)]
    )
    if not np.array_equal(separators, starts):
        yield f"{len(separators)} separators do not stand where {len(starts)} documents start"
        return
    if file.text_bytes != file.num_tokens - file.num_documents:
        yield f"text_bytes is {file.text_bytes}, expected {file.num_tokens - file.num_documents}"
    if any(int(block.max()) >= file.vocab for _, block in _blocks(file)):
        yield f"a token is not below vocab {file.vocab}"
        return
    ends = file.document_offsets.tolist()
    for number, expected in enumerate(file.document_hash.tolist()):
        text = file.read(ends[number] + 1, ends[number + 1]).astype(np.uint8).tobytes()
        if document_hash(text) != expected:
            yield f"document {number} has hash {document_hash(text):#018x}, expected {expected:#018x}"
    identity = (file.tokenizer, file.vocab, file.separator, file.document_offsets)
    digest = content_digest(*identity, (block.data for _, block in _blocks(file)))
    if digest != file.digest:
        yield f"digest is {digest}, expected {file.digest}"


def _blocks(file: TokenFile) -> Iterator[tuple[int, Tokens]]:
    """Yield the tokens in blocks, each with its position."""
    for start in range(0, file.num_tokens, BLOCK_TOKENS):
        yield start, file.read(start, min(start + BLOCK_TOKENS, file.num_tokens))
