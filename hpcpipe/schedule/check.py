"""The proof that a schedule is complete, ordered, and free of deadlock."""

from collections.abc import Sequence

import numpy as np

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.flat import Table, Truths
from hpcpipe.schedule.limits import check_in_flight, check_stash
from hpcpipe.schedule.positions import Positions, failure, locate
from hpcpipe.schedule.replay import replay


def check(schedule: Schedule, max_stash: Sequence[float] | None = None, max_in_flight: int | None = None) -> None:
    """Prove a lowered schedule, or say which rank breaks which rule at which position.

    The rules: every action stands on the rank of its stage and exists once; every stage runs every microbatch forward
    once, and backward once as B or as I and W (or, in a forward-only schedule, never); F stands before I or B, and I
    before W; weight gradients accumulate in ascending microbatch order; every message has one sender and one receiver,
    is sent after it is computed and posted before it is needed; the program runs to its end even if every send
    blocks until its receive is posted; and every stage that has a backward is reduced once, after its last weight
    gradient, and updated once, after every other action of its rank.

    Parameters
    ----------
    schedule : Schedule
        Compute actions and messages, as returned by `lower`.
    max_stash : sequence of float, optional
        The most that each rank may stash, in activations of one microbatch through all its layers.
    max_in_flight : int, optional
        The most messages that a rank may have sent and nobody taken up, on a clock where F = I = W.

    Raises
    ------
    UsageError
        With the schedule's name, the rank, the position, the action and the rule.
    """
    positions = locate(schedule)
    for rule in (_complete, _ordered, _ascending, _matched, _updated):
        rule(schedule, positions)
    replay(schedule, positions)
    if max_stash is not None:
        check_stash(schedule, positions, max_stash)
    if max_in_flight is not None:
        check_in_flight(schedule, positions, max_in_flight)


def _require(schedule: Schedule, holds: Truths, position: Table | None, rule: str) -> None:
    """Raise the first broken rule of a (stages, microbatches) table of truths, at a position or at the list's end."""
    broken = np.argwhere(~holds)
    if broken.size:
        stage, k = (int(index) for index in broken[0])
        rank = schedule.stage_to_rank[stage]
        where = len(schedule.actions[rank]) if position is None else int(position[stage, k])
        raise failure(schedule, rank, where, rule.format(stage=stage, k=k))


def _complete(schedule: Schedule, positions: Positions) -> None:
    _require(schedule, positions.has(Kind.F), None, "F{stage}.{k} is missing")
    whole, input_half, weight_half = (positions.has(kind) for kind in (Kind.B, Kind.I, Kind.W))
    right = ~(whole | input_half | weight_half)
    if not schedule.is_forward_only:
        right = (whole & ~input_half & ~weight_half) | (~whole & input_half & weight_half)
    _require(schedule, right, None, "stage {stage}, microbatch {k} needs one B, or one I and one W")


def _ordered(schedule: Schedule, positions: Positions) -> None:
    of = positions.of
    for later, earlier in ((Kind.B, Kind.F), (Kind.I, Kind.F), (Kind.W, Kind.I), (Kind.SEND_F, Kind.F)):
        in_order = positions.has(earlier) & (of[earlier] < of[later])
        rule = f"{earlier}{{stage}}.{{k}} must come first"
        _require(schedule, ~positions.has(later) | in_order, of[later], rule)
    ready = positions.backward_done()
    in_order = (ready >= 0) & (ready < of[Kind.SEND_B])
    rule = "B{stage}.{k} or I{stage}.{k} must come first"
    _require(schedule, ~positions.has(Kind.SEND_B) | in_order, of[Kind.SEND_B], rule)


def _ascending(schedule: Schedule, positions: Positions) -> None:
    if schedule.is_forward_only:
        return
    done = positions.weights_done()
    ascends = np.ones(done.shape, np.bool_)
    ascends[:, 1:] = done[:, 1:] > done[:, :-1]
    _require(schedule, ascends, done, "weight gradients must accumulate in ascending microbatch order")


def _matched(schedule: Schedule, positions: Positions) -> None:
    """Check that each boundary between ranks is crossed by one message per microbatch and direction, and no other."""
    of, stages = positions.of, range(schedule.num_stages)
    enters = np.array([[schedule.input_crosses(stage)] for stage in stages])
    leaves = np.array([[schedule.output_crosses(stage)] for stage in stages])
    has_backward = not schedule.is_forward_only
    for kind, crosses, consumer in (
        (Kind.SEND_F, leaves, None),
        (Kind.RECV_F, enters, of[Kind.F]),
        (Kind.SEND_B, enters & has_backward, None),
        (Kind.RECV_B, leaves & has_backward, positions.backward_done()),
    ):
        exists = positions.has(kind)
        _require(schedule, ~exists | crosses, of[kind], "no other rank takes part in this message")
        _require(schedule, exists | ~crosses, None, f"{kind}{{stage}}.{{k}} is missing: its message has one end only")
        if consumer is not None:
            rule = f"{kind}{{stage}}.{{k}} must be posted first"
            _require(schedule, ~exists | (of[kind] < consumer), consumer, rule)


def _updated(schedule: Schedule, positions: Positions) -> None:
    """Check the actions that end a step, which every stage has once and a forward-only schedule never."""
    of, flat = positions.of, positions.flat
    wanted = np.zeros(of[Kind.F].shape, np.bool_)
    wanted[:, 0] = not schedule.is_forward_only
    for kind in (Kind.REDUCE, Kind.STEP):
        exists = positions.has(kind)
        rule = f"a stage has one {kind} per step, and none if the schedule is forward-only"
        _require(schedule, wanted | ~exists, of[kind], rule)
        _require(schedule, exists | ~wanted, None, f"{kind}{{stage}} is missing")
    if schedule.is_forward_only:
        return
    added = positions.weights_done().max(axis=1, keepdims=True)
    rule = "every weight gradient of stage {stage} must come first"
    _require(schedule, ~wanted | (of[Kind.REDUCE] > added), of[Kind.REDUCE], rule)
    others = np.flatnonzero(~flat.is_any(Kind.STEP))
    last = np.empty(schedule.num_ranks, np.int64)
    # Of several values for one place the last is kept.
    last[flat.rank[others]] = others - flat.offsets[flat.rank[others]]
    before = last[np.array(schedule.stage_to_rank)][:, None]
    rule = "the update waits for all ranks, so every other action of this rank must come first"
    _require(schedule, ~wanted | (of[Kind.STEP] > before), of[Kind.STEP], rule)
