"""Copies of a rank's weights and moments in its own memory and in a neighbour's, made while the rank waits.

Each rank keeps the two newest versions of its own state and of a neighbour's, so that one version of every rank is
held while the next is under way: the collective call of each step keeps the ranks within one step of each other.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hpcpipe.kernels.digest import digest
from hpcpipe.memory.layout import new_arrays
from hpcpipe.model.tensors import BufferSpec, f32
from hpcpipe.mpi.channel import Channel
from hpcpipe.recovery.standing import NOTHING

VERSIONS = 2
_LEAST_MESSAGE = 1 << 18
_MOST_MESSAGES = 64
_PIECE = 1 << 16
"""Elements that are copied at a time: a message that the rank waits for is not looked for meanwhile."""


def neighbour_of(role: int, pipeline: int, data: int) -> int:
    """Return the rank that keeps the copies of a rank: in another replica, or half a pipeline away.

    Ranks are placed in order, so that on several nodes it is mostly on another one.
    """
    return (role + _distance(pipeline, data)) % (pipeline * data)


def kept_by(role: int, pipeline: int, data: int) -> int:
    """Return the rank whose copies a rank keeps; the inverse of `neighbour_of`."""
    return (role - _distance(pipeline, data)) % (pipeline * data)


def _distance(pipeline: int, data: int) -> int:
    return pipeline if data > 1 else max(1, pipeline // 2)


def copy_specs(own_size: int, held_size: int) -> dict[str, BufferSpec]:
    """Return what `Copies` keeps: two versions of a rank's own elements, and of its neighbour's."""
    return {
        **{f"own {version}": f32(own_size) for version in range(VERSIONS)},
        **{f"held {version}": f32(held_size) for version in range(VERSIONS)},
    }


def _unknown(step: int) -> Sequence[int]:
    return ()


class Copies:
    """What a rank keeps of its own state, and of its neighbour's.

    Parameters
    ----------
    parts : sequence of ndarray of float32
        What is copied: flat views of the live state, owned by the caller and only read.
    held_role : int
        The neighbour whose state is kept here.
    held_parts : sequence of int
        Elements of each of the neighbour's parts.
    every : int
        Steps between two copies.
    digests : callable
        Takes a step; returns the digest of each part as the update of that step has left it, nothing if not known.

    Attributes
    ----------
    own_steps, held_steps : list of int
        Step of each version, -1 where there is none.
    held_role : int
        As above.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        held_role: int,
        held_parts: Sequence[int],
        every: int,
        digests: Callable[[int], Sequence[int]] = _unknown,
    ) -> None:
        self._parts = list(parts)
        self._held_parts = list(held_parts)
        self._digests = digests
        self._digests_sent = np.zeros(len(self._parts), np.uint64)
        self._digests_held = np.zeros((VERSIONS, len(self._held_parts)), np.uint64)
        own_size = sum(part.size for part in self._parts)
        arrays = new_arrays(copy_specs(own_size, sum(held_parts)), "copies")
        self._own = [arrays[f"own {version}"] for version in range(VERSIONS)]
        self._held = [arrays[f"held {version}"] for version in range(VERSIONS)]
        self.own_steps, self.held_steps = [NOTHING] * VERSIONS, [NOTHING] * VERSIONS
        self.held_role = held_role
        self._every = every
        self._channel: Channel | None = None
        self._right = self._left = 0
        self._step = NOTHING
        self._slots = (0, 0)
        self._todo: list[tuple[np.ndarray, np.ndarray]] = []
        self._unsent: list[np.ndarray] = []
        self._filled = 0
        self._under_way: list[str] = []
        self._is_moving = False

    def connect(self, channel: Channel, right: int, left: int) -> None:
        """Copy over a channel from now on; what was under way is forgotten.

        Parameters
        ----------
        channel : Channel
            Between the ranks of the grid.
        right, left : int
            The rank that keeps this one's state, and the one whose state is kept here.
        """
        self._channel, self._right, self._left = channel, right, left
        self._todo, self._unsent, self._under_way, self._is_moving = [], [], [], False
        self._step = NOTHING

    def forget_after(self, step: int) -> None:
        """Drop versions of later steps, which will be computed again."""
        for steps in (self.own_steps, self.held_steps):
            steps[:] = [version if version <= step else NOTHING for version in steps]

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
        else:
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
        self.own_steps[own] = self.held_steps[held] = self._step
        self._step, self._under_way = NOTHING, []

    def drop_damaged(self) -> list[str]:
        """Look at all versions whose digests are known, forget those that have changed, and say which."""
        found = []
        for slot, step in enumerate(self.own_steps):
            known = self._digests(step) if step != NOTHING else ()
            if len(known) and not _matches(self._own[slot], [part.size for part in self._parts], known):
                self.own_steps[slot] = NOTHING
                found.append(f"own copy of step {step}")
        for slot, step in enumerate(self.held_steps):
            known = self._digests_held[slot].tolist() if step != NOTHING else ()
            if any(known) and not _matches(self._held[slot], self._held_parts, known):
                self.held_steps[slot] = NOTHING
                found.append(f"copy of step {step} of rank {self.held_role}")
        return found

    def digests(self, step: int) -> Sequence[int]:
        """Return the digests that came with the neighbour's elements at a step, zeros if it did not know any."""
        values: list[int] = self._digests_held[self.held_steps.index(step)].tolist()
        return values

    def own(self, step: int) -> np.ndarray:
        """Return this rank's elements at a step, its parts one behind the other."""
        return self._own[self.own_steps.index(step)]

    def held(self, step: int) -> np.ndarray:
        """Return the neighbour's elements at a step."""
        return self._held[self.held_steps.index(step)]

    def _start(self, step: int) -> None:
        """Post the receives of the neighbour's version, and note what is to be copied."""
        assert self._channel is not None
        self.finish()
        own, held = (steps.index(step if step in steps else min(steps)) for steps in (self.own_steps, self.held_steps))
        self.own_steps[own] = self.held_steps[held] = NOTHING
        self._step, self._slots = step, (own, held)
        self._exchange_digests(step, held)
        for index, chunk in enumerate(_cut(self._held[held])):
            name = f"part {index} of the copy of step {step} from rank {self._left}"
            self._channel.post_receive(name, chunk, self._left, 0)
            self._under_way.append(name)
        # Both lists are used up from their ends.
        self._unsent = _cut(self._own[own])[::-1]
        self._todo = list(_pairs(self._parts, self._own[own]))[::-1]
        self._filled = 0

    def _exchange_digests(self, step: int, held: int) -> None:
        """Give the right neighbour the digests of a step, and get those of the left one."""
        assert self._channel is not None
        self._digests_sent[:] = 0
        known = self._digests(step)
        self._digests_sent[: len(known)] = known
        names = f"digests of step {step} from rank {self._left}", f"digests of step {step} to rank {self._right}"
        self._channel.post_receive(names[0], self._digests_held[held], self._left, 0)
        self._channel.start_send(names[1], self._digests_sent, self._right, 0)
        self._under_way += names

    def _copy_one(self) -> None:
        """Copy a piece of the state, and send what is complete."""
        assert self._channel is not None
        source, target = self._todo.pop()
        np.copyto(target, source)
        self._filled += target.size
        while self._unsent and (not self._todo or self._unsent[-1].size <= self._filled):
            chunk = self._unsent.pop()
            self._filled -= chunk.size
            name = f"part {len(self._unsent)} of the copy of step {self._step} to rank {self._right}"
            self._channel.start_send(name, chunk, self._right, 0)
            self._under_way.append(name)


def _cut(flat: np.ndarray) -> list[np.ndarray]:
    """Cut elements into messages, alike on both ends."""
    size = max(_LEAST_MESSAGE, -(-flat.size // _MOST_MESSAGES))
    return [flat[first : first + size] for first in range(0, flat.size, size)]


def _matches(flat: np.ndarray, sizes: Sequence[int], known: Sequence[int]) -> bool:
    """Tell whether parts that lie one behind the other have these digests."""
    ends = np.cumsum(sizes).tolist()
    parts = (flat[end - size : end] for end, size in zip(ends, sizes, strict=True))
    return all(digest(part) == value for part, value in zip(parts, known, strict=True))


def _pairs(parts: Sequence[np.ndarray], flat: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pieces of the parts, none longer than `_PIECE`, and where they go."""
    start = 0
    for part in parts:
        for first in range(0, part.size, _PIECE):
            piece = part[first : first + _PIECE]
            yield piece, flat[start + first : start + first + piece.size]
        start += part.size
