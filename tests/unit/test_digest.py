"""Digests: the same however they are computed, another one for every damage that one fault does."""

import numpy as np
import pytest
from support.fresh import RANDOM

from hpcpipe.kernels import reference
from hpcpipe.kernels.digest import BLOCK, digest, digest_blocks
from hpcpipe.kernels.threads import Team


def words(size):
    return RANDOM.integers(0, 1 << 32, size, dtype=np.uint32)


@pytest.mark.parametrize("size", [0, 1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 5])
def test_it_is_what_plain_numpy_computes(size):
    content = words(size)
    num_blocks = -(-size // BLOCK)
    assert digest_blocks(content, 0, num_blocks) == reference.digest_blocks(content, 0, num_blocks)
    assert digest(content) == reference.digest_blocks(content, 0, num_blocks)
    middle = num_blocks // 2
    parts = int(digest_blocks(content, 0, middle)) + int(digest_blocks(content, middle, num_blocks))
    assert parts % (1 << 64) == digest(content)


def test_threads_change_nothing():
    content = words((1 << 19) + 12_345)
    team = Team(3)
    assert digest(content, team) == digest(content) == reference.digest_blocks(content, 0, -(-content.size // BLOCK))
    team.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16, np.uint8])
def test_any_kind_of_array(dtype):
    content = words(1002).view(dtype)
    expected = digest(words_of(content))
    assert digest(content) == expected
    read_only = content.copy()
    read_only.flags.writeable = False
    assert digest(read_only) == expected
    assert digest(content[::-1]) == digest(content[::-1].copy())
    odd = content[1:]
    assert digest(odd) == digest(words_of(odd))
    assert digest(content[:500].reshape(5, 100)) == digest(content[:500])


def words_of(array):
    """Copy the bytes of an array, filled up with zeros, into words."""
    content = array.tobytes()
    return np.frombuffer(content + bytes(-len(content) % 4), np.uint32).copy()


def test_every_flipped_bit_is_seen():
    content = words(3 * BLOCK + 7)
    before = digest(content)
    for place in RANDOM.integers(0, content.size, 50):
        for bit in range(32):
            content[place] ^= np.uint32(1 << bit)
            assert digest(content) != before
            content[place] ^= np.uint32(1 << bit)
    assert digest(content) == before


def test_a_changed_element_and_blocks_that_changed_places_are_seen():
    content = words(4 * BLOCK)
    before = digest(content)
    for value in (0, 0xFFFFFFFF, 0x7FC00000):
        changed = content.copy()
        changed[RANDOM.integers(content.size)] = value
        assert digest(changed) != before
    blocks = content.reshape(4, BLOCK)
    assert digest(np.ascontiguousarray(blocks[[0, 2, 1, 3]])) != before
    assert digest(np.concatenate([content, np.ones(1, np.uint32)])) != before
