"""Whether what was received is what was sent: numbers that depend on the content of messages, added up per peer."""

from collections import Counter
from collections.abc import Callable

import numpy as np

_MASK = (1 << 64) - 1


class Tally:
    """What one rank has sent to others and received from them.

    Parameters
    ----------
    digest : callable
        Gives a number below 2**64 that depends on every bit of an array.

    Attributes
    ----------
    sent, received : Counter of int
        Sums of the digests of the messages to and from each peer since `clear`.
    """

    def __init__(self, digest: Callable[[np.ndarray], int]) -> None:
        self._digest = digest
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()

    def clear(self) -> None:
        """Begin anew, when all messages are complete."""
        self.sent.clear()
        self.received.clear()

    def add_sent(self, peer: int, buffer: np.ndarray) -> None:
        """Add a message that is about to leave."""
        self.sent[peer] += self._digest(buffer)

    def add_received(self, peer: int, buffer: np.ndarray) -> None:
        """Add a message that has arrived, before anything changes the buffer."""
        self.received[peer] += self._digest(buffer)

    def balance(self) -> int:
        """Return what was sent less what was received, modulo 2**64: over all ranks it adds up to 0."""
        return (sum(self.sent.values()) - sum(self.received.values())) & _MASK

    def row(self, num_peers: int) -> list[int]:
        """Return what was sent to each peer, then what was received from each, modulo 2**64."""
        return [sums[peer] & _MASK for sums in (self.sent, self.received) for peer in range(num_peers)]


def differing_links(rows: list[list[int]]) -> list[tuple[int, int]]:
    """Return the pairs (sender, receiver) between which messages have changed.

    Parameters
    ----------
    rows : list of list of int
        `Tally.row` of each rank, in their order.
    """
    size = len(rows)
    return [
        (sender, receiver)
        for sender in range(size)
        for receiver in range(size)
        if rows[sender][receiver] != rows[receiver][size + sender]
    ]
