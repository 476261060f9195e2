"""Copies of a rank's weights and moments, made while the rank waits, where a neighbour has them when it dies.

Each rank keeps the two newest versions of its own state, so that one is whole while the next is under way: the
collective call of each step keeps the ranks within one step of each other. Its neighbour maps them, if it runs on the
same machine: memory outlives the process that wrote it. On another machine the neighbour gets them as messages.
"""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hpcpipe.memory.block import new_block
from hpcpipe.memory.shared import SharedBlock, map_shared
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.recovery.standing import NOTHING
from hpcpipe.recovery.store import VERSIONS, Store, store_bytes

NAME = "copies"
"""What their memory is counted under."""

_LEAST_MESSAGE = 1 << 18
_MOST_MESSAGES = 64
_PIECE = 1 << 16
"""Elements that are copied at a time: a message that the rank waits for is not looked for meanwhile."""


def neighbour_of(role: int, pipeline: int, data: int) -> int:
    """Return the rank that has the copies of a rank: in another replica, or half a pipeline away.

    Ranks are placed in order, so that on several nodes it is mostly on another one.
    """
    return (role + _distance(pipeline, data)) % (pipeline * data)


def kept_by(role: int, pipeline: int, data: int) -> int:
    """Return the rank whose copies a rank has; the inverse of `neighbour_of`."""
    return (role - _distance(pipeline, data)) % (pipeline * data)


def _distance(pipeline: int, data: int) -> int:
    return pipeline if data > 1 else max(1, pipeline // 2)


def copies_bytes(own_parts: Sequence[int], held_parts: Sequence[int], *, as_messages: bool) -> int:
    """Return the bytes that `Copies` allocates: also for the neighbour's versions if they come as messages."""
    return store_bytes(own_parts) + (store_bytes(held_parts) if as_messages else 0)


def _unknown(step: int) -> Sequence[int]:
    return ()


class Copies:
    """What a rank keeps of its own state, and has of its neighbour's.

    Parameters
    ----------
    parts : sequence of ndarray of float32
        What is copied: flat views of the live state, owned by the caller and only read.
    every : int
        Steps between two copies.
    digests : callable
        Takes a step; returns the digest of each part as the update of that step has left it, nothing if not known.

    Attributes
    ----------
    held_role : int
        The rank whose copies are here, -1 before `connect`.
    """

    def __init__(
        self, parts: Sequence[np.ndarray], every: int, digests: Callable[[int], Sequence[int]] = _unknown
    ) -> None:
        self._parts = list(parts)
        self._every = every
        self._digests = digests
        sizes = [part.size for part in self._parts]
        self._block = SharedBlock(NAME)
        self._num_bytes = store_bytes(sizes)
        self._own = Store(self._block.allocate(self._num_bytes), sizes).clear()
        self.held_role = NOTHING
        self._held: Store | None = None
        self._forgotten: set[int] = set()
        self._sends = self._receives = False
        self._channel: Channel | None = None
        self._right = self._left = 0
        self._step = NOTHING
        self._slots = (0, 0)
        self._todo: list[tuple[np.ndarray, np.ndarray]] = []
        self._unsent: list[np.ndarray] = []
        self._filled = 0
        self._digests_sent = np.zeros(len(sizes), np.uint64)
        self._under_way: list[str] = []
        self._is_moving = False

    def close(self) -> None:
        """Give the memory back, as far as no neighbour has it."""
        self._block.close()

    def connect(
        self,
        grid: Grid,
        waiter: Waiter,
        mode: MessageMode,
        held_parts: Sequence[int],
        hosts: Sequence[str],
        processes: Sequence[int],
    ) -> None:
        """Find the neighbours of a grid, whose ranks all call it; what was under way before is forgotten.

        Parameters
        ----------
        grid : Grid
            This rank's place.
        waiter : Waiter
            Waits, with its deadline.
        mode : MessageMode
            How messages are sent.
        held_parts : sequence of int
            Elements of each part of the rank whose copies this one has.
        hosts, processes : sequence of str, of int
            The machine of each rank, and the number of its process there.
        """
        rank, comm = grid.comm.rank, grid.comm
        self._right = neighbour_of(rank, grid.pipeline, grid.data)
        self._left = self.held_role = kept_by(rank, grid.pipeline, grid.data)
        self._channel = Channel(comm, waiter, mode)
        self._todo, self._unsent, self._under_way, self._is_moving = [], [], [], False
        self._step, self._forgotten = NOTHING, set()
        handles = gather_rows(comm, waiter, np.array([self._block.handle], np.int64))[:, 0]
        mapped = None
        if hosts[self._left] == hosts[rank]:
            mapped = _map(processes[self._left], int(handles[self._left]), held_parts)
        has_mapped = gather_rows(comm, waiter, np.array([mapped is not None]))[:, 0]
        self._sends, self._receives = not has_mapped[self._right], mapped is None
        if mapped is None:
            memory = new_block(store_bytes(held_parts), NAME)
            mapped = Store(memory, held_parts).clear()
        self._held = mapped

    @property
    def own_steps(self) -> tuple[int, ...]:
        """Step of each version of this rank's state, -1 where there is none."""
        return tuple(self._own.steps.tolist())

    @property
    def held_steps(self) -> tuple[int, ...]:
        """Step of each version of the neighbour's state."""
        if self._held is None:
            return (NOTHING,) * VERSIONS
        return tuple(NOTHING if step in self._forgotten else step for step in self._held.steps.tolist())

    def forget_after(self, step: int) -> None:
        """Drop versions of later steps, which will be computed again."""
        self._own.steps[self._own.steps > step] = NOTHING

    def begin(self, step: int) -> None:
        """Start to copy the state of a finished step, if one is due; every rank of the grid calls it."""
        if step % self._every == 0:
            self._start(step)

    def take(self, step: int) -> None:
        """Copy the state of a finished step at once; every rank of the grid calls it."""
        self._start(step)
        self.finish()

    def advance(self) -> None:
        """Do a part of what is to be done, without waiting."""
        if self._step == NOTHING or self._is_moving:
            return
        self._is_moving = True
        if self._todo:
            self._copy_one()
        elif self._under_way:
            assert self._channel is not None
            self._under_way = [name for name in self._under_way if not self._channel.is_complete(name)]
        self._is_moving = False

    def finish(self) -> None:
        """Wait until what was begun is complete; to be called before the state changes.

        Raises
        ------
        RankError
            If a neighbour does not answer in time.
        CommunicationError
            If one has died.
        """
        if self._step == NOTHING:
            return
        assert self._channel is not None and self._held is not None
        self._is_moving = True
        while self._todo:
            self._copy_one()
        for name in self._under_way:
            self._channel.wait(name)
        self._is_moving = False
        own, held = self._slots
        self._own.steps[own] = self._step
        if self._receives:
            self._held.steps[held] = self._step
        self._step, self._under_way = NOTHING, []

    def drop_damaged(self) -> list[str]:
        """Look at all versions whose digests are known, forget those that have changed, and say which."""
        found = []
        for version, step in enumerate(self.own_steps):
            if step != NOTHING and self._own.is_damaged(version):
                self._own.steps[version] = NOTHING
                found.append(f"own copy of step {step}")
        for version, step in enumerate(self.held_steps):
            if step != NOTHING and self._held is not None and self._held.is_damaged(version):
                self._forgotten.add(step)
                found.append(f"copy of step {step} of rank {self.held_role}")
        return found

    def own(self, step: int) -> np.ndarray:
        """Return this rank's elements at a step, its parts one behind the other."""
        return self._own.versions[self._own.find(step)]

    def held(self, step: int) -> np.ndarray:
        """Return the neighbour's elements at a step; only read."""
        assert self._held is not None
        return self._held.versions[self._held.find(step)]

    def held_digests(self, step: int) -> list[int]:
        """Return the digests of the neighbour's parts at a step, zeros if it did not know any."""
        assert self._held is not None
        values: list[int] = self._held.digests[self._held.find(step)].tolist()
        return values

    def _start(self, step: int) -> None:
        """Note what is to be copied, and post the receives of what the neighbour sends."""
        assert self._held is not None
        self.finish()
        own = self._own.oldest(step)
        self._own.steps[own] = NOTHING
        known = self._digests(step)
        self._own.digests[own] = known if len(known) else 0
        self._step, self._slots = step, (own, self._held.oldest(step) if self._receives else 0)
        if self._receives:
            self._post_receives(step)
        # Both lists are used up from their ends.
        self._todo = list(_pieces(self._parts, self._own.versions[own]))[::-1]
        self._unsent = _cut(self._own.versions[own])[::-1] if self._sends else []
        self._filled = 0
        if self._sends:
            self._send(f"digests of step {step}", self._own.digests[own])

    def _post_receives(self, step: int) -> None:
        assert self._channel is not None and self._held is not None
        held = self._slots[1]
        self._held.steps[held] = NOTHING
        for index, array in enumerate((self._held.digests[held], *_cut(self._held.versions[held]))):
            name = f"part {index} of the copy of step {step} from rank {self._left}"
            self._channel.post_receive(name, array, self._left, 0)
            self._under_way.append(name)

    def _copy_one(self) -> None:
        """Copy a piece of the state, and send what is complete, if it is sent."""
        source, target = self._todo.pop()
        np.copyto(target, source)
        self._filled += target.size
        while self._unsent and (not self._todo or self._unsent[-1].size <= self._filled):
            chunk = self._unsent.pop()
            self._filled -= chunk.size
            self._send(f"part {len(self._unsent)} of the copy of step {self._step}", chunk)

    def _send(self, what: str, array: np.ndarray) -> None:
        assert self._channel is not None
        name = f"{what} to rank {self._right}"
        self._channel.start_send(name, array, self._right, 0)
        self._under_way.append(name)


def _map(process: int, handle: int, sizes: Sequence[int]) -> Store | None:
    """Map the store of another process of this machine; None where the system does not let us see it."""
    try:
        descriptor = os.open(f"/proc/{process}/fd/{handle}", os.O_RDONLY)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size < store_bytes(sizes):
            return None
        return Store(map_shared(descriptor, store_bytes(sizes)), sizes)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _cut(flat: np.ndarray) -> list[np.ndarray]:
    """Cut elements into messages, alike on both ends."""
    size = max(_LEAST_MESSAGE, -(-flat.size // _MOST_MESSAGES))
    return [flat[first : first + size] for first in range(0, flat.size, size)]


def _pieces(parts: Sequence[np.ndarray], flat: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pieces of the parts, none longer than `_PIECE`, and where they go."""
    start = 0
    for part in parts:
        for first in range(0, part.size, _PIECE):
            piece = part[first : first + _PIECE]
            yield piece, flat[start + first : start + first + piece.size]
        start += part.size
