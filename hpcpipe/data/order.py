"""The order of samples: a keyed permutation that is computed, never stored."""

import hashlib
import math
import struct
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_NUM_ROUNDS = 8
_MAX_SIZE = 1 << 62
_ALL_BITS = (1 << 64) - 1

Indices = npt.NDArray[np.uint64]


def permuted(seed: int, epoch: int, index: npt.ArrayLike, size: int) -> Indices:
    """Apply a pseudo-random permutation of ``range(size)`` to indices, in O(1) memory.

    A Feistel network of 8 rounds over ``range(a) x range(b)`` with ``a = ceil(sqrt(size))``, ``b = ceil(size / a)``;
    an image outside ``range(size)`` is put through the network again until it falls inside (cycle walking; Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Halves are mixed by addition modulo their size,
    which is a bijection whatever the round function is. All arithmetic is in uint64: mixed with int64 numpy would
    silently fall back to float64.

    Parameters
    ----------
    seed, epoch : int
        The key; another epoch is another permutation.
    index : array_like of int
        Indices in ``range(size)``, any shape.
    size : int
        Number of permuted values, 1 to 2**62.

    Returns
    -------
    ndarray of uint64, shape of ``index``
        The images; owned by the caller.

    Raises
    ------
    ValueError
        ``size`` or an index is out of range.
    """
    if not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"size must be from 1 to 2**62, not {size}")
    indices = np.asarray(index).astype(np.uint64)  # a negative index becomes a huge one and is refused below
    value = indices.ravel()
    if value.size and int(value.max()) >= size:
        raise ValueError(f"index {value.max()} is outside range({size})")
    keys = _round_keys(seed, epoch)
    limit = np.uint64(size)
    value = _feistel(value, keys, size)
    outside = np.flatnonzero(value >= limit)
    while outside.size:
        value[outside] = _feistel(value[outside], keys, size)
        outside = outside[value[outside] >= limit]
    return value.reshape(indices.shape)


def sample_index(seed: int, global_index: npt.ArrayLike, num_samples: int) -> Indices:
    """Say which sample is read at a position of the endless sequence of samples.

    Position ``g`` lies in epoch ``g // num_samples``; every epoch reads each sample once, in an order of its own.

    Parameters
    ----------
    seed : int
        The run's seed.
    global_index : array_like of int
        Positions: samples read before this one since step 0, over all ranks. Any shape.
    num_samples : int
        Samples in an epoch.

    Returns
    -------
    ndarray of uint64, shape of ``global_index``
        Sample numbers in ``range(num_samples)``; owned by the caller.

    Raises
    ------
    ValueError
        ``num_samples`` is below 1, or a position is negative.
    """
    positions = np.asarray(global_index)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    if positions.size and int(positions.min()) < 0:
        raise ValueError(f"position {positions.min()} is negative")
    epochs, within = np.divmod(positions.astype(np.uint64), np.uint64(num_samples))
    samples = np.empty(positions.shape, dtype=np.uint64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        samples[chosen] = permuted(seed, int(epoch), within[chosen], num_samples)
    return samples


def sample_at(seed: int, position: int, num_samples: int) -> int:
    """Return what `sample_index` does, for one position, without any array.

    Parameters
    ----------
    seed : int
        The run's seed.
    position : int
        Samples read before this one since step 0, over all ranks.
    num_samples : int
        Samples in an epoch.

    Raises
    ------
    ValueError
        ``num_samples`` is not from 1 to 2**62, or the position is negative.
    """
    if not 1 <= num_samples <= _MAX_SIZE:
        raise ValueError(f"num_samples must be from 1 to 2**62, not {num_samples}")
    if position < 0:
        raise ValueError(f"position {position} is negative")
    epoch, value = divmod(position, num_samples)
    keys = _round_keys(seed, epoch)
    rows = math.isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)
    while True:
        left, right = divmod(value, columns)
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left = (left + _mix_one(right ^ key) % rows) % rows
            else:
                right = (right + _mix_one(left ^ key) % columns) % columns
        value = left * columns + right
        if value < num_samples:
            return value


def _mix_one(value: int) -> int:
    """Mix the bits of one number as `_mix` does."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _ALL_BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _ALL_BITS
    return value ^ (value >> 31)


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """One 64-bit key per round: the 64 bytes of BLAKE2b of seed and epoch."""
    digest = hashlib.blake2b(f"hpcpipe sample order {seed} {epoch}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return struct.unpack(f"<{_NUM_ROUNDS}Q", digest)


def _feistel(value: Indices, keys: tuple[int, ...], size: int) -> Indices:
    """Permute ``range(a * b)``, which is ``range(size)`` and fewer than ``sqrt(size) + 1`` more."""
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    a, b = np.uint64(rows), np.uint64(columns)
    left, right = np.divmod(value, b)
    for number, key in enumerate(keys):
        round_key = np.uint64(key)
        if number % 2 == 0:
            left = (left + _mix(right ^ round_key) % a) % a
        else:
            right = (right + _mix(left ^ round_key) % b) % b
    return left * b + right


def _mix(value: Indices) -> Indices:
    """Mix bits by the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014; Stafford's variant 13)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
