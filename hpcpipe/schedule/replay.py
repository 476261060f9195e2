"""Running all ranks' lists against each other, with sends that block until their receive is posted."""

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.positions import failure

_FORWARD, _BACKWARD = 0, 1


def replay(schedule: Schedule) -> None:
    """Run a schedule whose messages match, and refuse it if it cannot reach its end.

    A send waits until its receive is posted, which is how MPI treats messages above a size that nobody should rely
    on; a compute action waits for its message, or for the stage beside it on the same rank. A rank that waits is tried
    again when what it waits for happens, so the replay takes time in proportion to the number of actions.

    Raises
    ------
    UsageError
        With the rank that waits, the position, and that nothing can go on.
    """
    num_microbatches = schedule.num_microbatches
    size = schedule.num_stages * num_microbatches
    enters = [schedule.input_crosses(stage) for stage in range(schedule.num_stages)]
    leaves = [schedule.output_crosses(stage) for stage in range(schedule.num_stages)]
    last = schedule.num_stages - 1
    # Indexed by direction and by the stage that receives; computed: by the stage that computes.
    posted = [bytearray(size), bytearray(size)]
    arrived = [bytearray(size), bytearray(size)]
    computed = [bytearray(size), bytearray(size)]
    position = [0] * schedule.num_ranks
    waiting: dict[tuple[int, int, int], int] = {}
    runnable = list(range(schedule.num_ranks))

    while runnable:
        rank = runnable.pop()
        actions = schedule.actions[rank]
        at = position[rank]
        while at < len(actions):
            kind, stage, k = actions[at]
            index = stage * num_microbatches + k
            event: tuple[int, int, int] | None = None
            if kind is Kind.F:
                if stage > 0:
                    table = arrived[_FORWARD] if enters[stage] else computed[_FORWARD]
                    needed = index if enters[stage] else index - num_microbatches
                    if not table[needed]:
                        waiting[0 if enters[stage] else 1, _FORWARD, needed] = rank
                        break
                computed[_FORWARD][index] = 1
                event = (1, _FORWARD, index)
            elif kind is Kind.B or kind is Kind.I:
                if stage < last:
                    table = arrived[_BACKWARD] if leaves[stage] else computed[_BACKWARD]
                    needed = index if leaves[stage] else index + num_microbatches
                    if not table[needed]:
                        waiting[0 if leaves[stage] else 1, _BACKWARD, needed] = rank
                        break
                computed[_BACKWARD][index] = 1
                event = (1, _BACKWARD, index)
            elif kind is Kind.RECV_F or kind is Kind.RECV_B:
                direction = _FORWARD if kind is Kind.RECV_F else _BACKWARD
                posted[direction][index] = 1
                event = (2, direction, index)
            elif kind is Kind.SEND_F or kind is Kind.SEND_B:
                direction = _FORWARD if kind is Kind.SEND_F else _BACKWARD
                receiver = index + (num_microbatches if kind is Kind.SEND_F else -num_microbatches)
                if not posted[direction][receiver]:
                    waiting[2, direction, receiver] = rank
                    break
                arrived[direction][receiver] = 1
                event = (0, direction, receiver)
            at += 1
            if event is not None and event in waiting:
                runnable.append(waiting.pop(event))
        position[rank] = at

    for rank, actions in enumerate(schedule.actions):
        if position[rank] < len(actions):
            raise failure(schedule, rank, position[rank], "deadlock: no rank can go on from here")
