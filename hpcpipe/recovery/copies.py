"""Copies of a rank's weights and moments, made while the rank waits, where others have them when it dies.

Each rank keeps the two newest versions of its own state, so that one is whole while the next is under way: the
collective call of each step keeps the ranks within one step of each other. All ranks of the same machine map them:
memory outlives the process that wrote it. If its neighbour is on another machine it gets them as messages besides.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from hpcpipe.memory.block import new_block
from hpcpipe.memory.shared import SharedBlock, map_shared
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.recovery.standing import NOTHING
from hpcpipe.recovery.store import Store, store_bytes

NAME = "copies"
"""What their memory is counted under."""

_LEAST_MESSAGE = 1 << 18
_MOST_MESSAGES = 64
_PIECE = 1 << 16
"""Elements that are copied at a time: a message that the rank waits for is not looked for meanwhile."""


def neighbour_of(role: int, pipeline: int, data: int) -> int:
    """Return the rank that has the copies of a rank wherever it runs: in another replica, or half a pipeline away.

    Ranks are placed in order, so that on several nodes it is mostly on another one.
    """
    return (role + _distance(pipeline, data)) % (pipeline * data)


def kept_by(role: int, pipeline: int, data: int) -> int:
    """Return the rank whose copies a rank has wherever it runs; the inverse of `neighbour_of`."""
    return (role - _distance(pipeline, data)) % (pipeline * data)


def _distance(pipeline: int, data: int) -> int:
    return pipeline if data > 1 else max(1, pipeline // 2)


def copies_bytes(own_parts: Sequence[int], held_parts: Sequence[int], *, as_messages: bool) -> int:
    """Return the bytes that `Copies` allocates: also for the neighbour's versions if they come as messages."""
    return store_bytes(own_parts) + (store_bytes(held_parts) if as_messages else 0)


def _unknown(step: int) -> Sequence[int]:
    return ()


class Copies:
    """What a rank keeps of its own state, and has of others'.

    Parameters
    ----------
    parts : sequence of ndarray of float32
        What is copied: flat views of the live state, owned by the caller and only read.
    every : int
        Steps between two copies.
    digests : callable
        Takes a step; returns the digest of each part as the update of that step has left it, nothing if not known.
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
        self._held: dict[int, Store] = {}
        self._forgotten: set[tuple[int, int]] = set()
        self._received: Store | None = None
        self._sends = False
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
        parts: Mapping[int, Sequence[int]],
        hosts: Sequence[str],
        processes: Sequence[int],
    ) -> None:
        """Find the other ranks of a grid, which all call it; what was under way before is forgotten.

        Parameters
        ----------
        grid : Grid
            This rank's place.
        waiter : Waiter
            Waits, with its deadline.
        mode : MessageMode
            How messages are sent.
        parts : mapping of int to sequence of int
            Elements of each part of every rank.
        hosts, processes : sequence of str, of int
            The machine of each rank, and the number of its process there.
        """
        rank, comm = grid.comm.rank, grid.comm
        self._right = neighbour_of(rank, grid.pipeline, grid.data)
        self._left = kept_by(rank, grid.pipeline, grid.data)
        self._channel = Channel(comm, waiter, mode)
        self._todo, self._unsent, self._under_way, self._is_moving = [], [], [], False
        self._step, self._forgotten = NOTHING, set()
        handles = gather_rows(comm, waiter, np.array([self._block.handle], np.int64))[:, 0]
        near = (role for role, host in enumerate(hosts) if host == hosts[rank] and role != rank)
        found = {role: _map(processes[role], int(handles[role]), parts[role]) for role in near}
        self._held = {role: store for role, store in found.items() if store is not None}
        has_mapped = gather_rows(comm, waiter, np.array([self._left in self._held]))[:, 0]
        self._sends, self._received = not has_mapped[self._right], None
        if self._left not in self._held:
            memory = new_block(store_bytes(parts[self._left]), NAME)
            self._received = self._held[self._left] = Store(memory, parts[self._left]).clear()

    @property
    def own_steps(self) -> tuple[int, int]:
        """Step of each version of this rank's state, -1 where there is none."""
        first, second = self._own.steps.tolist()
        return first, second

    def held_steps(self, role: int) -> tuple[int, int]:
        """Return the step of each version of another rank's state, -1 where there is none here."""
        if role not in self._held:
            return NOTHING, NOTHING
        steps = self._held[role].steps.tolist()
        first, second = (NOTHING if (role, step) in self._forgotten else step for step in steps)
        return first, second

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
        assert self._channel is not None
        self._is_moving = True
        while self._todo:
            self._copy_one()
        for name in self._under_way:
            self._channel.wait(name)
        self._is_moving = False
        own, held = self._slots
        self._own.steps[own] = self._step
        if self._received is not None:
            self._received.steps[held] = self._step
        self._step, self._under_way = NOTHING, []

    def own(self, step: int) -> np.ndarray | None:
        """Return this rank's elements at a step, its parts one behind the other; None if they were damaged."""
        version = self._own.find(step)
        if self._own.is_damaged(version):
            self._own.steps[version] = NOTHING
            return None
        return self._own.versions[version]

    def whole(self) -> list[np.ndarray]:
        """Return the versions of this rank's state that are there."""
        return [self._own.versions[version] for version, step in enumerate(self.own_steps) if step != NOTHING]

    def held(self, role: int, step: int) -> np.ndarray | None:
        """Return another rank's elements at a step, only read; None if they were damaged, and gone from then on."""
        store = self._held[role]
        version = store.find(step)
        if store.is_damaged(version):
            self._forgotten.add((role, step))
            return None
        return store.versions[version]

    def held_digests(self, role: int, step: int) -> list[int]:
        """Return the digests of another rank's parts at a step, zeros if it did not know any."""
        store = self._held[role]
        values: list[int] = store.digests[store.find(step)].tolist()
        return values

    def _start(self, step: int) -> None:
        """Note what is to be copied, and post the receives of what the neighbour sends."""
        self.finish()
        own = self._own.oldest(step)
        self._own.steps[own] = NOTHING
        known = self._digests(step)
        self._own.digests[own] = known if len(known) else 0
        self._step, self._slots = step, (own, 0 if self._received is None else self._received.oldest(step))
        self._post_receives(step)
        # Both lists are used up from their ends.
        self._todo = list(_pieces(self._parts, self._own.versions[own]))[::-1]
        self._unsent = _cut(self._own.versions[own])[::-1] if self._sends else []
        self._filled = 0
        if self._sends:
            self._send(f"digests of step {step}", self._own.digests[own])

    def _post_receives(self, step: int) -> None:
        store, held = self._received, self._slots[1]
        if store is None:
            return
        assert self._channel is not None
        store.steps[held] = NOTHING
        for index, array in enumerate((store.digests[held], *_cut(store.versions[held]))):
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
