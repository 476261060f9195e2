"""The proof that a schedule is complete, ordered, and free of deadlock."""

from collections import Counter

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import COMPUTE, Action, Kind, Schedule

_SEND_OF = {Kind.RECV_F: (Kind.SEND_F, -1), Kind.RECV_B: (Kind.SEND_B, +1)}


def check(schedule: Schedule) -> None:
    """Prove a lowered schedule, or say which rank breaks which rule at which position.

    The rules: every action stands on the rank of its stage and exists once; every stage runs every microbatch forward
    once, and backward once as B or as I and W (or, in a forward-only schedule, never); F stands before I or B, and I
    before W; weight gradients accumulate in ascending microbatch order; every message has one sender and one receiver;
    and the program runs to its end even if every send blocks until its receive is posted.

    Parameters
    ----------
    schedule : Schedule
        Compute actions and messages, as returned by `lower`.

    Raises
    ------
    UsageError
        With the schedule's name, the rank, the position, the action and the rule.
    """
    _check_places(schedule)
    _check_complete(schedule)
    for rank in range(schedule.num_ranks):
        _check_order(schedule, rank)
    _check_messages(schedule)
    _check_runs(schedule)


def _fail(schedule: Schedule, rank: int, position: int, rule: str) -> UsageError:
    actions = schedule.actions[rank]
    where = f"position {position}, {actions[position]}" if position < len(actions) else "the end of its list"
    return UsageError(f"schedule {schedule.name}: rank {rank}, {where}: {rule}")


def _check_places(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.actions):
        seen: set[Action] = set()
        for position, action in enumerate(actions):
            if not 0 <= action.stage < schedule.num_stages:
                raise _fail(schedule, rank, position, f"there are only {schedule.num_stages} stages")
            if not 0 <= action.microbatch < schedule.num_microbatches:
                raise _fail(schedule, rank, position, f"there are only {schedule.num_microbatches} microbatches")
            holder = schedule.stage_to_rank[action.stage]
            if holder != rank:
                raise _fail(schedule, rank, position, f"stage {action.stage} belongs to rank {holder}")
            if action in seen:
                raise _fail(schedule, rank, position, "the action stands twice in the list")
            seen.add(action)


def _check_complete(schedule: Schedule) -> None:
    present = {action for actions in schedule.actions for action in actions}
    for stage, rank in enumerate(schedule.stage_to_rank):
        end = len(schedule.actions[rank])
        for k in range(schedule.num_microbatches):
            if Action(Kind.F, stage, k) not in present:
                raise _fail(schedule, rank, end, f"F{stage}.{k} is missing")
            kinds = "".join(kind for kind in (Kind.B, Kind.I, Kind.W) if Action(kind, stage, k) in present)
            if kinds not in (("",) if schedule.is_forward_only else ("B", "IW")):
                raise _fail(
                    schedule,
                    rank,
                    end,
                    f"stage {stage}, microbatch {k} needs one B, or I and W; it has '{kinds}'",
                )


def _check_order(schedule: Schedule, rank: int) -> None:
    done: set[Action] = set()
    last_weight: dict[int, int] = {}
    for position, action in enumerate(schedule.actions[rank]):
        kind, stage, k = action.kind, action.stage, action.microbatch
        before = {Kind.B: Kind.F, Kind.I: Kind.F, Kind.W: Kind.I, Kind.SEND_F: Kind.F}.get(kind)
        if before is not None and Action(before, stage, k) not in done:
            raise _fail(schedule, rank, position, f"{before}{stage}.{k} must come first")
        if kind is Kind.SEND_B and done.isdisjoint({Action(Kind.B, stage, k), Action(Kind.I, stage, k)}):
            raise _fail(schedule, rank, position, f"B{stage}.{k} or I{stage}.{k} must come first")
        if kind in (Kind.B, Kind.W):
            if k != last_weight.get(stage, -1) + 1:
                raise _fail(schedule, rank, position, "weight gradients must accumulate in ascending microbatch order")
            last_weight[stage] = k
        done.add(action)


def _check_messages(schedule: Schedule) -> None:
    sends: Counter[Action] = Counter()
    receives: Counter[Action] = Counter()
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            if action.kind in (Kind.SEND_F, Kind.SEND_B):
                crosses = schedule.output_crosses if action.kind is Kind.SEND_F else schedule.input_crosses
                if not crosses(action.stage):
                    raise _fail(schedule, rank, position, "no other rank waits for this message")
                sends[action] += 1
            elif action.kind in _SEND_OF:
                receives[_matching_send(action)] += 1
    for rank, actions in enumerate(schedule.actions):
        posted: set[Action] = set()
        for position, action in enumerate(actions):
            if action.kind in (Kind.SEND_F, Kind.SEND_B) and receives[action] != 1:
                raise _fail(schedule, rank, position, "the message has no receiver")
            if action.kind in _SEND_OF and sends[_matching_send(action)] != 1:
                raise _fail(schedule, rank, position, "the message has no sender")
            for needed in _received_before(schedule, action):
                if needed not in posted:
                    raise _fail(schedule, rank, position, f"{needed} must be posted first")
            posted.add(action)


def _matching_send(receive: Action) -> Action:
    kind, step = _SEND_OF[receive.kind]
    return Action(kind, receive.stage + step, receive.microbatch)


def _received_before(schedule: Schedule, action: Action) -> list[Action]:
    """Return the receives that a compute action waits for."""
    if action.kind is Kind.F and schedule.input_crosses(action.stage):
        return [Action(Kind.RECV_F, action.stage, action.microbatch)]
    if action.kind in (Kind.B, Kind.I) and schedule.output_crosses(action.stage):
        return [Action(Kind.RECV_B, action.stage, action.microbatch)]
    return []


def _local_inputs(schedule: Schedule, action: Action) -> list[set[Action]]:
    """Return what a compute action needs from neighbouring stages of the same rank: one of each set."""
    stage, k = action.stage, action.microbatch
    if action.kind is Kind.F and stage > 0 and not schedule.input_crosses(stage):
        return [{Action(Kind.F, stage - 1, k)}]
    last = stage + 1 == schedule.num_stages
    if action.kind in (Kind.B, Kind.I) and not last and not schedule.output_crosses(stage):
        return [{Action(Kind.B, stage + 1, k), Action(Kind.I, stage + 1, k)}]
    return []


def _check_runs(schedule: Schedule) -> None:
    """Replay all ranks with sends that complete only once their receive is posted."""
    position = [0] * schedule.num_ranks
    posted: set[Action] = set()
    done: set[Action] = set()

    def can_go_on(action: Action) -> bool:
        if action.kind in COMPUTE:
            arrived = all(_matching_send(receive) in done for receive in _received_before(schedule, action))
            return arrived and not any(either.isdisjoint(done) for either in _local_inputs(schedule, action))
        return action.kind in _SEND_OF or action in posted

    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while position[rank] < len(actions) and can_go_on(actions[position[rank]]):
                action = actions[position[rank]]
                if action.kind in _SEND_OF:
                    posted.add(_matching_send(action))
                done.add(action)
                position[rank] += 1
                moved = True
    for rank, actions in enumerate(schedule.actions):
        if position[rank] < len(actions):
            raise _fail(schedule, rank, position[rank], "deadlock: no rank can go on from here")
