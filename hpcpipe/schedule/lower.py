"""Lowering: put the messages between the compute actions, in one pass that serves every schedule."""

from hpcpipe.schedule.action import Action, Kind, Schedule

_SEND = {Kind.F: Kind.SEND_F, Kind.B: Kind.SEND_B, Kind.I: Kind.SEND_B}


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
    return Schedule(
        schedule.name,
        schedule.num_microbatches,
        schedule.stage_to_rank,
        tuple(_lower_list(schedule, actions, ahead) for actions in schedule.actions),
    )


def _lower_list(schedule: Schedule, actions: tuple[Action, ...], ahead: int) -> tuple[Action, ...]:
    lowered: list[Action] = []
    posted = 0
    for position, action in enumerate(actions):
        for later in actions[posted : position + ahead + 1]:
            lowered += _receive(schedule, later)
        posted = max(posted, position + ahead + 1)
        lowered.append(action)
        lowered += _send(schedule, action)
    return tuple(lowered)


def _receive(schedule: Schedule, action: Action) -> list[Action]:
    """Return the receive that a compute action needs, if any."""
    if action.kind is Kind.F and schedule.input_crosses(action.stage):
        return [Action(Kind.RECV_F, action.stage, action.microbatch)]
    if action.kind in (Kind.B, Kind.I) and schedule.output_crosses(action.stage):
        return [Action(Kind.RECV_B, action.stage, action.microbatch)]
    return []


def _send(schedule: Schedule, action: Action) -> list[Action]:
    """Return the send that follows a compute action, if any."""
    crosses = {
        Kind.F: schedule.output_crosses,
        Kind.B: schedule.input_crosses,
        Kind.I: schedule.input_crosses,
    }.get(action.kind)
    if crosses is None or not crosses(action.stage):
        return []
    return [Action(_SEND[action.kind], action.stage, action.microbatch)]
