"""Lowering: put the messages between the compute actions, in one pass that serves every schedule."""

from hpcpipe.schedule.action import Action, Kind, Schedule


def lower(schedule: Schedule, ahead: int = 1) -> Schedule:
    """Add sends and receives to a schedule of compute actions.

    A send follows the action that produces what it carries. A receive is posted `ahead` compute actions before the one
    that needs it, so that a message can travel while its receiver still computes and so that no send waits for a
    receive that stands behind another send.

    Parameters
    ----------
    schedule : Schedule
        Compute actions only.
    ahead : int
        How many compute actions earlier than needed a receive is posted.

    Returns
    -------
    Schedule
        The same compute actions in the same order, with messages between them.
    """
    stages = range(schedule.num_stages)
    enters = [schedule.input_crosses(stage) for stage in stages]
    leaves = [schedule.output_crosses(stage) for stage in stages]
    # For each kind: which stages receive before it and as what, and which send after it and as what.
    receives = {Kind.F: (enters, Kind.RECV_F), Kind.B: (leaves, Kind.RECV_B), Kind.I: (leaves, Kind.RECV_B)}
    sends = {Kind.F: (leaves, Kind.SEND_F), Kind.B: (enters, Kind.SEND_B), Kind.I: (enters, Kind.SEND_B)}
    silent: tuple[list[bool], Kind] = ([False for _ in stages], Kind.W)

    lists = []
    for actions in schedule.actions:
        lowered: list[Action] = []
        # A receive is posted when the compute action `ahead` places before its own is reached.
        for position in range(-ahead, len(actions)):
            if position + ahead < len(actions):
                kind, stage, k = actions[position + ahead]
                crosses, message = receives.get(kind, silent)
                if crosses[stage]:
                    lowered.append(Action(message, stage, k))
            if position >= 0:
                kind, stage, k = actions[position]
                lowered.append(actions[position])
                crosses, message = sends.get(kind, silent)
                if crosses[stage]:
                    lowered.append(Action(message, stage, k))
        lists.append(tuple(lowered))
    return Schedule(schedule.name, schedule.num_microbatches, schedule.stage_to_rank, tuple(lists))
