"""Sums and copies between replicas that own one shard each, moving while their ranks compute.

The order of every addition is that of `tree_sum`, whatever the MPI library does.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from mpi4py import MPI

from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import tree_sum
from hpcpipe.mpi.tally import Tally
from hpcpipe.mpi.wait import Waiter

_LARGEST_MESSAGE = 1 << 20
_SMALLEST_MESSAGE = 1 << 16


def message_elements(num_replicas: int) -> int:
    """Return the elements of the largest message: so few that those from all other replicas fit a bounded memory."""
    return max(_SMALLEST_MESSAGE, _LARGEST_MESSAGE // max(1, num_replicas - 1))


def receive_elements(num_replicas: int, largest_shard: int) -> int:
    """Return the elements of memory that `ShardExchange` receives into, for shards up to a size."""
    return (num_replicas - 1) * min(message_elements(num_replicas), largest_shard)


@dataclass(frozen=True)
class _Transfer:
    """An array that replicas sum or complete, and the bounds of their shards."""

    name: str
    array: np.ndarray
    cuts: Sequence[int]
    is_sum: bool

    @property
    def largest(self) -> int:
        """Elements of the largest shard."""
        return max(last - first for first, last in pairwise(self.cuts))

    def part(self, shard: int, first: int, size: int) -> np.ndarray:
        """Return a window of a shard, which may be empty."""
        start = min(self.cuts[shard] + first, self.cuts[shard + 1])
        return self.array[start : min(start + size, self.cuts[shard + 1])]


class ShardExchange:
    """Reduce-scatters and all-gathers between replicas, one after the other, in windows of bounded size.

    Nothing here blocks but `finish`: what was started moves whenever `advance` is called. All ranks start the same
    transfers in the same order.

    Parameters
    ----------
    comm : Comm
        The replicas; rank r owns shard r.
    waiter : Waiter
        Waits, with its deadline.
    mode : MessageMode
        How messages are sent.
    received : ndarray of float32
        The caller's, to receive into: `receive_elements` of them for the largest of all shards.
    tally : Tally, optional
        Counts the content of the messages of sums.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        waiter: Waiter,
        mode: MessageMode,
        received: np.ndarray,
        tally: Tally | None = None,
    ) -> None:
        self._rank, self._size = comm.rank, comm.size
        # What shards are completed by is compared when it has arrived everywhere, not message by message.
        self._channels = {
            is_sum: Channel(comm, waiter, mode, tally if is_sum else None, "message") for is_sum in (True, False)
        }
        # Every rank starts with another peer, so that no rank gets the messages of all others at once.
        self._peers = [(comm.rank + step) % comm.size for step in range(1, comm.size)]
        self._window = message_elements(comm.size)
        self._received = received
        self._queue: deque[_Transfer] = deque()
        self._first = 0
        self._parts: list[np.ndarray] = []
        self._under_way: list[str] = []
        self._is_moving = self._is_finishing = False

    def reduce_scatter(self, name: str, array: np.ndarray, cuts: Sequence[int]) -> None:
        """Start to replace this rank's shard by the sum of all ranks' in the order of `tree_sum`.

        Parameters
        ----------
        name : str
            What the array holds, for errors.
        array : ndarray of float32, shape (n,)
            Contiguous; the caller's, to be left alone until `finish`. Outside of the own shard it keeps its values.
        cuts : sequence of int
            Bounds of the shards, from 0 to n.
        """
        self._add(_Transfer(name, array, cuts, is_sum=True))

    def all_gather(self, name: str, array: np.ndarray, cuts: Sequence[int]) -> None:
        """Start to fill the shards of the other ranks with what they have there; parameters as in `reduce_scatter`."""
        self._add(_Transfer(name, array, cuts, is_sum=False))

    def advance(self) -> None:
        """Do what can be done without waiting."""
        # A wait inside of `finish`, or a delay of a test, may get here again.
        if self._queue and not self._is_moving and not self._is_finishing:
            self._move()

    def finish(self) -> None:
        """Wait until everything that was started is complete.

        Raises
        ------
        RankError
            If a replica does not answer in time.
        """
        self._is_finishing = True
        while self._queue:
            for name in self._under_way:
                self._channel.wait(name)
            self._move()
        self._is_finishing = False

    @property
    def _channel(self) -> Channel:
        """What the first transfer moves over."""
        return self._channels[self._queue[0].is_sum]

    def _add(self, transfer: _Transfer) -> None:
        if self._size > 1 and transfer.array.size:
            self._queue.append(transfer)
            self.advance()

    def _move(self) -> None:
        """Close windows whose messages are complete and open the next ones, until some are not."""
        self._is_moving = True
        while self._queue:
            if not self._parts:
                self._open_window()
            self._under_way = [name for name in self._under_way if not self._channel.is_complete(name)]
            if self._under_way:
                break
            self._close_window()
        self._is_moving = False

    def _open_window(self) -> None:
        """Post the receives of a window, then start its sends."""
        transfer, tag = self._queue[0], int(self._queue[0].is_sum)
        parts = [transfer.part(shard, self._first, self._window) for shard in range(self._size)]
        own = parts[self._rank]
        if transfer.is_sum:
            outgoing = {peer: parts[peer] for peer in self._peers}
            incoming = {
                peer: self._received[place * own.size : (place + 1) * own.size]
                for place, peer in enumerate(self._peers)
            }
            self._parts = [own if rank == self._rank else incoming[rank] for rank in range(self._size)]
        else:
            outgoing = dict.fromkeys(self._peers, own)
            incoming = {peer: parts[peer] for peer in self._peers}
            self._parts = parts
        for peer in reversed(self._peers):
            if incoming[peer].size:
                self._under_way.append(f"{transfer.name} from replica {peer}")
                self._channel.post_receive(self._under_way[-1], incoming[peer], peer, tag)
        for peer in self._peers:
            if outgoing[peer].size:
                self._under_way.append(f"{transfer.name} to replica {peer}")
                self._channel.start_send(self._under_way[-1], outgoing[peer], peer, tag)

    def _close_window(self) -> None:
        """Use what has arrived, and go to the next window or the next transfer."""
        transfer, parts, self._parts = self._queue[0], self._parts, []
        own = parts[self._rank]
        if transfer.is_sum and own.size:
            total = tree_sum(parts)
            if total is not own:
                own[...] = total
        self._first += self._window
        if self._first >= transfer.largest:
            self._queue.popleft()
            self._first = 0
