"""Lowering: put the messages between the compute actions, in one pass that serves every schedule."""

from bisect import bisect_left

from hpcpipe.schedule.action import Action, Kind, Schedule
from hpcpipe.schedule.clock import Times, run

_AHEAD = 1


def lower(schedule: Schedule) -> Schedule:
    """Add sends and receives to a schedule of compute actions.

    A send follows the action that produces what it carries. A receive is posted at least one compute action before the
    one that needs it, so that a message can travel while its receiver computes, and no later than the action that the
    receiver runs when the message is sent, on a clock where every action takes one turn. On that clock each send finds
    its receive posted, so the program cannot hang even if sends block, whatever the real times are.

    Parameters
    ----------
    schedule : Schedule
        Compute actions only.

    Returns
    -------
    Schedule
        The same compute actions in the same order, with messages between them.
    """
    turn = [1.0] * schedule.num_stages
    starts, ends = run(schedule, schedule.actions, turn, turn, turn)
    receives = _place_receives(schedule, starts, ends)
    leaves = [schedule.output_crosses(stage) for stage in range(schedule.num_stages)]
    enters = [schedule.input_crosses(stage) for stage in range(schedule.num_stages)]
    sends = {Kind.F: (leaves, Kind.SEND_F), Kind.B: (enters, Kind.SEND_B), Kind.I: (enters, Kind.SEND_B)}

    lists = []
    for actions, due in zip(schedule.actions, receives, strict=True):
        lowered: list[Action] = []
        for position, action in enumerate(actions):
            lowered += due[position]
            lowered.append(action)
            kind, stage, k = action
            if kind is not Kind.W:
                crosses, message = sends[kind]
                if crosses[stage]:
                    lowered.append(Action(message, stage, k))
        lists.append(tuple(lowered))
    return Schedule(schedule.name, schedule.num_microbatches, schedule.stage_to_rank, tuple(lists))


def _place_receives(schedule: Schedule, starts: Times, ends: Times) -> list[list[list[Action]]]:
    """Return, for each rank and position, the receives to post there, in the order in which they are sent."""
    consumers: dict[tuple[bool, int, int], int] = {}
    for actions in schedule.actions:
        for position, (kind, stage, k) in enumerate(actions):
            if kind is not Kind.W:
                consumers[kind is Kind.F, stage, k] = position

    placed: list[list[tuple[int, float, Action]]] = [[] for _ in schedule.actions]
    for actions, times in zip(schedule.actions, ends, strict=True):
        # A schedule that cannot run has no times for the rest of its lists; the proof will refuse it.
        for (kind, stage, k), sent in zip(actions, times, strict=False):
            is_forward = kind is Kind.F
            receiver = stage + (1 if is_forward else -1)
            crosses = schedule.output_crosses(stage) if is_forward else schedule.input_crosses(stage)
            needed = consumers.get((is_forward, receiver, k))
            if kind is Kind.W or not crosses or needed is None:
                continue
            rank = schedule.stage_to_rank[receiver]
            running = bisect_left(starts[rank], sent) - 1
            message = Action(Kind.RECV_F if is_forward else Kind.RECV_B, receiver, k)
            placed[rank].append((max(0, min(running, needed - _AHEAD)), sent, message))

    receives: list[list[list[Action]]] = [[[] for _ in actions] for actions in schedule.actions]
    for rank, messages in enumerate(placed):
        for position, _, message in sorted(messages):
            receives[rank][position].append(message)
    return receives
