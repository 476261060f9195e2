"""Parts of a state on their way to whoever needs them: the same rule for a new rank, a new grid, and a step back.

What is held is a list of entries, ranges of tensors under their global names; what is wanted is such a list too. Where
they meet there is a move. Every process computes all moves alike, so that both ends of each know of it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpcpipe.errors import RankError
from hpcpipe.faults import hooks
from hpcpipe.mpi.channel import Channel


@dataclass(frozen=True)
class Entry:
    """The elements ``[start, stop)`` of a tensor, and where they lie among the elements of a rank.

    Attributes
    ----------
    name, kind : str
        Global name of the tensor; weight or moment.
    start, stop : int
        In C order.
    offset : int
        Of the first one, in the rank's parts one behind the other.
    """

    name: str
    kind: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Move:
    """Elements that go from the state of one rank to a survivor.

    Attributes
    ----------
    role : int
        The rank of the old grid whose state they are of.
    offset : int
        Of the first one in that rank's parts.
    size : int
        Their number.
    rank : int
        The survivor that wants them.
    wanted, at : int
        Index of what it wants, and the element of it that they start at.
    """

    role: int
    offset: int
    size: int
    rank: int
    wanted: int
    at: int


def plan_moves(held: Mapping[int, Sequence[Entry]], wanted: Mapping[int, Sequence[Entry]]) -> list[Move]:
    """Return the moves that give every survivor what it wants.

    Parameters
    ----------
    held : mapping of int to sequence of Entry
        What each rank of the old grid had.
    wanted : mapping of int to sequence of Entry
        What each survivor wants; `offset` does not count.

    Raises
    ------
    RankError
        If an element that is wanted is held by nobody.
    """
    by_tensor: dict[tuple[str, str], list[tuple[int, Entry]]] = defaultdict(list)
    for role, entries in held.items():
        for entry in entries:
            by_tensor[entry.name, entry.kind].append((role, entry))
    for sources in by_tensor.values():
        sources.sort(key=lambda source: source[1].start)
    moves = []
    for rank, wants in wanted.items():
        for index, want in enumerate(wants):
            place = want.start
            for role, entry in by_tensor[want.name, want.kind]:
                if entry.start <= place < entry.stop and place < want.stop:
                    stop = min(entry.stop, want.stop)
                    offset = entry.offset + place - entry.start
                    moves.append(Move(role, offset, stop - place, rank, index, place - want.start))
                    place = stop
            if place < want.stop:
                raise RankError(f"elements {place} to {want.stop} of {want.kind} {want.name} are held by no rank")
    return moves


class Parts:
    """The parts of one rank, which may lie apart, as if they lay one behind the other.

    Parameters
    ----------
    parts : sequence of ndarray
        Flat; owned by the caller.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(part.size for part in self._parts)])

    def view(self, offset: int, size: int) -> np.ndarray:
        """Return elements that lie within one part."""
        index = int(np.searchsorted(self._starts, offset, "right")) - 1
        first = offset - int(self._starts[index])
        return self._parts[index][first : first + size]


def carry_out(
    moves: Sequence[Move],
    holders: Mapping[int, int],
    sources: Mapping[int, Parts],
    targets: Sequence[np.ndarray],
    channel: Channel,
    rank: int,
) -> int:
    """Move what this process has or wants; every process calls it with the same moves.

    Parameters
    ----------
    moves : sequence of Move
        All of them.
    holders : mapping of int to int
        The survivor that holds the state of each rank of the old grid.
    sources : mapping of int to Parts
        Of the ranks whose state this process holds.
    targets : sequence of ndarray
        What this process wants, flat: written to.
    channel : Channel
        Between all survivors.
    rank : int
        This process among them.

    Returns
    -------
    int
        Bytes that this process has received.
    """
    names, received = [], 0
    for index, move in enumerate(moves):
        source = holders[move.role]
        name = f"part {index} of the state from process {source} to {move.rank}"
        if move.rank == rank:
            target = targets[move.wanted][move.at : move.at + move.size]
            if source == rank:
                np.copyto(target, sources[move.role].view(move.offset, move.size))
                continue
            channel.post_receive(name, target, source, 0)
            received += target.nbytes
            names.append(name)
        elif source == rank:
            channel.start_send(name, sources[move.role].view(move.offset, move.size), move.rank, 0)
            names.append(name)
    hooks.point("restore")
    for name in names:
        channel.wait(name)
    return received
