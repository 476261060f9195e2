"""Makes a token file of random ids, such as a corpus tokenised for GPT-2 would be.

python tests/peers/random_tokens.py tokens.h5 [--vocab 50257] [--tokens 1048576] [--seed 1]
"""

import argparse
import zlib
from pathlib import Path

import numpy as np

from hpcpipe.data.format import BLOCK_TOKENS, TOKEN, Contents, build_image, content_digest, document_hash


def write_random_tokens(path: Path, vocab: int, num_tokens: int, seed: int) -> None:
    """Write one document of uniformly random ids behind a separator, the last id of the vocabulary.

    `hpcpipe data prepare` makes ids of bytes only. Nothing is held out of a single document, and there is no text to
    sample: set ``train.sample_tokens = 0``.
    """
    tokens = np.random.default_rng(seed).integers(0, vocab - 1, num_tokens).astype(TOKEN)
    separator = tokens[0] = vocab - 1
    blocks = [tokens[start : start + BLOCK_TOKENS].tobytes() for start in range(0, num_tokens, BLOCK_TOKENS)]
    offsets = np.array([0, num_tokens], np.uint64)
    name = b"random"
    contents = Contents(
        source=f"random ids, seed {seed}",
        tokenizer="ids",
        vocab=vocab,
        separator=separator,
        text_bytes=num_tokens - 1,
        document_offsets=offsets,
        document_hash=np.array([document_hash(tokens.tobytes())], np.uint64),
        document_name_offsets=np.array([0, len(name)], np.uint64),
        document_names=np.frombuffer(name, np.uint8),
        block_crc32=np.array([zlib.crc32(block) for block in blocks], np.uint32),
        digest=content_digest("ids", vocab, separator, offsets, blocks),
    )
    with path.open("w+b") as file:
        file.seek(build_image(contents, file))
        file.write(tokens.tobytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write_random_tokens(arguments.path, arguments.vocab, arguments.tokens, arguments.seed)
