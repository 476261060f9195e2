"""The clock of a schedule whose ranks share fewer cores than there are ranks."""

from collections.abc import Sequence

from hpcpipe.schedule.clock import Instants


def run_on_shared_cores(
    offsets: Sequence[int], needs: Sequence[int], durations: Sequence[float], delays: Sequence[float], cores: float
) -> tuple[Instants, Instants]:
    """Start each action as `hpcpipe.schedule.clock.run` does, where ranks that compute at one time share the cores.

    The operating system is taken to be fair: while n ranks compute on fewer cores, each advances at the rate cores/n.
    A rank that waits uses none. (Processor sharing, as in queueing theory.)

    Parameters
    ----------
    offsets, needs, durations, delays
        As for `hpcpipe.schedule.clock.run`; durations in processor time.
    cores : float
        Cores for all ranks together, more than 0.

    Returns
    -------
    starts, ends : list of float or None
        For each action; None if its rank waits for ever.
    """
    num_actions, num_ranks = offsets[-1], len(offsets) - 1
    starts: Instants = [None] * num_actions
    ends: Instants = [*starts, 0.0, None]
    position = list(offsets[:-1])
    left: dict[int, float] = {}
    waiting: dict[int, int] = {}
    asleep: dict[int, float] = {}
    now = 0.0

    def begin(rank: int) -> None:
        """Let a rank take its next action, wait for what it needs, or end."""
        index = position[rank]
        if index == offsets[rank + 1]:
            return
        ready = ends[needs[index]]
        if ready is None:
            waiting[needs[index]] = rank
        elif ready + delays[index] > now:
            asleep[rank] = ready + delays[index]
        else:
            starts[index] = now
            left[rank] = durations[index]

    for rank in range(num_ranks):
        begin(rank)
    while left or asleep:
        rate = min(1.0, cores / max(1, len(left)))
        finish = now + min(left.values()) / rate if left else float("inf")
        wake = min(asleep.values(), default=float("inf"))
        elapsed = min(finish, wake) - now
        now = min(finish, wake)
        for rank in left:
            left[rank] -= elapsed * rate
        # What rounding leaves of an action is nothing beside the shortest one.
        done = [rank for rank, rest in left.items() if rest <= 1e-12 * now] if finish <= wake else []
        for rank in done:
            del left[rank]
            index = position[rank]
            ends[index] = now
            position[rank] += 1
        for rank in done:
            begin(rank)
            freed = waiting.pop(position[rank] - 1, None)
            if freed is not None:
                begin(freed)
        for rank in [rank for rank, time in asleep.items() if time <= now]:
            del asleep[rank]
            begin(rank)
    return starts, ends[:num_actions]
