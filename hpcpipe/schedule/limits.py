"""Two limits that a schedule may be held to: the stash of a rank, and the messages that it has in flight."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.clock import needs_of, run
from hpcpipe.schedule.flat import KINDS, Table, Times
from hpcpipe.schedule.positions import Positions, failure

_PRECISION = 1e-9


def stashes_within(activations: float, num_chunks: int) -> float:
    """Return how many stashes, of one stage each, some activations of a rank with several stages make."""
    return float(np.floor(activations * num_chunks * (1 + _PRECISION)))


def check_stash(schedule: Schedule, positions: Positions, max_stash: Sequence[float]) -> None:
    """Refuse a schedule in which a rank stashes more than its limit.

    Parameters
    ----------
    schedule : Schedule
        Complete and ordered.
    positions : Positions
        Where its actions stand.
    max_stash : sequence of float
        For each rank, in activations of one microbatch through all its layers.

    Raises
    ------
    UsageError
        With the rank, the position of the forward that is too much, and the numbers.
    """
    if len(max_stash) != schedule.num_ranks:
        raise UsageError(
            f"there are {len(max_stash)} limits of the stash and {schedule.num_ranks} ranks: give one each"
        )
    flat = positions.flat
    change = flat.is_any(Kind.F) * 1
    if not schedule.is_forward_only:
        change -= flat.is_any(Kind.B, Kind.W)
    for rank, (start, stop) in enumerate(pairwise(flat.offsets.tolist())):
        num_chunks = max(1, len(schedule.stages_of(rank)))
        # A forward-only schedule keeps a stash only while it makes it.
        live = change[start:stop] if schedule.is_forward_only else np.cumsum(change[start:stop])
        over = ~(live <= stashes_within(max_stash[rank], num_chunks))
        if over.any():
            at = int(np.argmax(over))
            found = f"{live[at] / num_chunks:g} activations, and the limit is {max_stash[rank]:g}"
            raise failure(schedule, rank, at, f"the stash grows to {found}")


def check_in_flight(schedule: Schedule, positions: Positions, max_in_flight: int) -> None:
    """Refuse a schedule in which a rank has more messages in flight than a limit, on a clock where F = I = W.

    A message is in flight from the end of the action that makes it until the start of the one that takes it; it takes
    no time itself. That is the figure of `simulate` at its default costs.

    Parameters
    ----------
    schedule : Schedule
        Complete, ordered, and free of deadlock.
    positions : Positions
        Where its actions stand.
    max_in_flight : int
        For each rank, as the sender.

    Raises
    ------
    UsageError
        With the rank, the position of the send that is too much, and the numbers.
    """
    flat = positions.flat.compute()
    needs = needs_of(schedule, flat)
    takes = np.flatnonzero(needs < len(needs))
    takes = takes[flat.rank[needs[takes]] != flat.rank[takes]]
    turns = 1.0 + flat.is_any(Kind.B)
    timed = run(flat.offsets.tolist(), needs.tolist(), turns.tolist(), [0.0] * len(needs))
    starts, ends = (np.array(times, np.float64) for times in timed)
    makes = needs[takes]
    order, counts = in_flight(flat.rank[makes], ends[makes], starts[takes])
    over = counts > max_in_flight
    if over.any():
        index = int(makes[order[np.argmax(over)] % len(makes)])
        stage, k, rank = int(flat.stage[index]), int(flat.microbatch[index]), int(flat.rank[index])
        send = Kind.SEND_F if KINDS[flat.kind[index]] is Kind.F else Kind.SEND_B
        found = f"{int(counts.max())} at most where F = I = W, and the limit is {max_in_flight}"
        raise failure(schedule, rank, int(positions.of[send][stage, k]), f"too many messages are in flight: {found}")


def in_flight(senders: Table, sent: Times, taken: Times) -> tuple[Table, Table]:
    """Count messages in flight, sender after sender.

    Parameters
    ----------
    senders, sent, taken : ndarray, shape (messages,)
        The rank that sends each message, when, and when its receiver takes it up.

    Returns
    -------
    order, counts : ndarray of int64, shape (2 messages,)
        Events in order, below the number of messages the sending of that message, from there on its taking; and how
        many of the event's sender are in flight after it.
    """
    rank = np.concatenate((senders, senders))
    change = np.repeat([1, -1], len(senders))
    # A message that is taken up at the moment it is sent is not in flight; what one sender sends is all taken up.
    order = np.lexsort((change, np.concatenate((sent, taken)), rank))
    return order, np.cumsum(change[order])
