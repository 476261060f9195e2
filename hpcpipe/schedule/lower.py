"""Lowering: put messages and updates between the compute actions, in one pass that serves every schedule."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise, repeat

import numpy as np

from hpcpipe.schedule.action import COMPUTE, Action, Kind, Schedule
from hpcpipe.schedule.clock import needs_of, run
from hpcpipe.schedule.flat import Flat, Table, Times, flatten

_AHEAD = 1


def lower(schedule: Schedule) -> Schedule:
    """Add sends, receives and updates to a schedule of compute actions.

    A send follows the action that produces what it carries. A receive is posted at least one compute action before the
    one that needs it, so that a message can travel while its receiver computes, and no later than the action that the
    receiver runs when the message is sent, on a clock where every action takes one turn. On that clock each send finds
    its receive posted, so the program cannot hang even if sends block, whatever the real times are. Where updates go is
    said in `with_updates`, and what becomes of the first stage's halves in `with_whole_first_stage`.

    Parameters
    ----------
    schedule : Schedule
        Compute actions only.

    Returns
    -------
    Schedule
        The same work in the same order, with messages and updates between the actions.
    """
    schedule = with_whole_first_stage(schedule)
    flat = flatten(schedule.actions)
    needs = needs_of(schedule, flat)
    takes = np.flatnonzero((needs >= 0) & (needs < len(needs)))
    takes = takes[flat.rank[needs[takes]] != flat.rank[takes]]
    turns = 1.0 + flat.is_any(Kind.B)
    timed = run(flat.offsets.tolist(), needs.tolist(), turns.tolist(), [0.0] * len(needs))
    starts, ends = (np.array(times, np.float64) for times in timed)
    # A schedule that cannot run has no times for the rest of its lists; the proof will refuse it.
    takes = takes[~np.isnan(ends[needs[takes]])]
    makes = needs[takes]
    posted = _post(flat, takes, starts, ends[makes])
    # Receives at one place are posted in the order in which they are sent, gradients first.
    order = np.lexsort((flat.microbatch[takes], flat.stage[takes], flat.is_any(Kind.F)[takes], ends[makes], posted))

    receives = _messages(flat, takes[order], Kind.RECV_F, Kind.RECV_B)
    sends = _messages(flat, makes, Kind.SEND_F, Kind.SEND_B)
    merged = [*receives, *chain.from_iterable(schedule.actions), *sends]
    place = np.concatenate((posted[order], np.arange(len(needs)), makes))
    part = np.repeat([0, 1, 2], [len(receives), len(needs), len(sends)])
    order = np.argsort(3 * place + part, kind="stable")
    merged = [merged[index] for index in order.tolist()]
    bounds = np.searchsorted(place[order], flat.offsets).tolist()
    lists = tuple(tuple(merged[start:stop]) for start, stop in pairwise(bounds))
    return with_updates(replace(schedule, actions=lists))


def with_whole_first_stage(schedule: Schedule) -> Schedule:
    """Make one ``B`` of each ``I`` and ``W`` of the first stage that stand side by side.

    Nobody waits for the gradient of the first stage's input, so the times stay the same, and a whole backward keeps
    nothing between its halves (as JaxPP does, arXiv 2412.14374).
    """
    lists = []
    for rank, actions in enumerate(schedule.actions):
        fused: list[Action] = []
        for action in actions if schedule.stage_to_rank[:1] == (rank,) else ():
            if action[:2] == (Kind.W, 0) and fused and fused[-1] == action._replace(kind=Kind.I):
                fused.pop()
                action = action._replace(kind=Kind.B)
            fused.append(action)
        lists.append(tuple(fused) or actions)
    return replace(schedule, actions=tuple(lists))


def with_updates(schedule: Schedule) -> Schedule:
    """Add what ends a step: ``REDUCE`` and ``STEP`` of every stage; a forward-only schedule stays as it is.

    A stage's ``REDUCE`` follows its last weight gradient, so that the sum over replicas travels while the rank goes on
    with other stages; if that action also makes a message, another rank waits for it, and it is sent first. A rank's
    ``STEP``s stand at the end of its list, because the gradient norm needs all stages.

    Parameters
    ----------
    schedule : Schedule
        With messages, without updates.
    """
    lists = []
    for rank, actions in enumerate(schedule.actions):
        held = schedule.stages_of(rank)
        last = _last_weight_gradients(actions, set(held))
        listed = list(actions)
        for at, stage in sorted(((at, stage) for stage, at in last.items()), reverse=True):
            follows = at + 1
            if follows < len(actions) and actions[follows] == (Kind.SEND_B, stage, actions[at].microbatch):
                follows += 1
            listed.insert(follows, Action(Kind.REDUCE, stage, 0))
        listed += [Action(Kind.STEP, stage, 0) for stage in held if stage in last]
        lists.append(tuple(listed))
    return replace(schedule, actions=tuple(lists))


def _last_weight_gradients(actions: Sequence[Action], stages: set[int]) -> dict[int, int]:
    """Return where the last B or W of each stage stands; a stage that has none is left out."""
    found: dict[int, int] = {}
    for at in range(len(actions) - 1, -1, -1):
        kind, stage, _ = actions[at]
        if (kind is Kind.W or kind is Kind.B) and stage in stages and stage not in found:
            found[stage] = at
            if len(found) == len(stages):
                break
    return found


def without_messages(schedule: Schedule) -> Schedule:
    """Return the compute actions of a schedule, from which `lower` makes messages and updates again."""
    lists = tuple(tuple(action for action in actions if action.kind in COMPUTE) for actions in schedule.actions)
    return replace(schedule, actions=lists)


def _post(flat: Flat, takes: Table, starts: Times, sent: Times) -> Table:
    """Return, for each action that takes a message, the index of the one before which its receive is posted."""
    posted = np.empty_like(takes)
    bounds = np.searchsorted(takes, flat.offsets)
    for (first, last), (start, stop) in zip(pairwise(bounds), pairwise(flat.offsets), strict=True):
        running = start + np.searchsorted(starts[start:stop], sent[first:last]) - 1
        posted[first:last] = np.maximum(start, np.minimum(running, takes[first:last] - _AHEAD))
    return posted


def _messages(flat: Flat, indices: Table, forward: Kind, backward: Kind) -> list[Action]:
    """Return a message of one kind for every forward, and of the other for every backward."""
    kinds = [forward if ahead else backward for ahead in flat.is_any(Kind.F)[indices].tolist()]
    columns = zip(kinds, flat.stage[indices].tolist(), flat.microbatch[indices].tolist(), strict=True)
    # What Action(...) does, without calling a Python function for each.
    return list(map(tuple.__new__, repeat(Action), columns))
