"""Text to bytes and back."""

import numpy as np
import pytest

from hpcpipe.data.tokenizer import ByteTokenizer, tokenizer_named
from hpcpipe.errors import UsageError

TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize("text", ["", "plain", "ünï 🎉 \0\n", "<|document|>", "a" * 1000])
def test_text_round_trips(text):
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32
    assert ids[0] == TOKENIZER.separator == 256
    assert ids[1:].tolist() == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_separators_inside_are_newlines():
    assert TOKENIZER.decode([256, 97, 256, 98]) == "a\nb"


def test_what_is_no_text_becomes_replacement_characters():
    assert TOKENIZER.decode([97, 0xE2, 98, 300, -1, 99]) == "a\ufffdb\ufffd\ufffdc"


def test_bytes_of_a_command_line_that_is_not_utf8():
    assert TOKENIZER.encode(b"\xff".decode("utf-8", "surrogateescape")).tolist() == [256, 255]
    with pytest.raises(UsageError, match="character 1 is a lone surrogate"):
        TOKENIZER.encode("a\ud800")


def test_tokenizers_are_found_by_name():
    assert tokenizer_named("bytes").vocab == 257
    with pytest.raises(UsageError, match="unknown tokenizer 'bpe'; this version of hpcpipe has: bytes"):
        tokenizer_named("bpe")
