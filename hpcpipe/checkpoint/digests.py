"""The hash that each version of the format uses, and how a file's digest comes from those of its regions."""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Protocol

from blake3 import blake3

from hpcpipe.checkpoint.layout import VERSION

DIGEST_BYTES = 32
_KEYS = {1: "blake2b", 2: "blake3"}


class Hash(Protocol):
    """What BLAKE2b and BLAKE3 have in common."""

    def update(self, data: Any, /) -> object:
        """Go on with more bytes."""

    def digest(self) -> bytes:
        """Return the 32 bytes of all so far."""


def digest_key(version: int = VERSION) -> str:
    """Name the hash of a version, as the manifest's keys do."""
    return _KEYS[version]


def new_hash(version: int = VERSION) -> Hash:
    """Start a hash: BLAKE2b of 32 bytes in version 1, BLAKE3 since."""
    return blake2b(digest_size=DIGEST_BYTES) if version == 1 else blake3()


def digest_of(data: bytes | memoryview, version: int = VERSION) -> bytes:
    """Hash bytes that are in memory; contiguous, only read."""
    digest = new_hash(version)
    digest.update(data)
    return digest.digest()


def join(digests: Iterable[bytes], version: int = VERSION) -> bytes:
    """Return the digest of a file: the hash of its regions' digests, in the order of the file."""
    return digest_of(b"".join(digests), version)


def is_digest(value: object) -> bool:
    """Tell whether a manifest may have this as a digest: 64 hexadecimal digits in lower case."""
    return isinstance(value, str) and len(value) == 2 * DIGEST_BYTES and set(value) <= set("0123456789abcdef")
