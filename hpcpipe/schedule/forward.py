"""The forward-only schedule of evaluation and generation."""

from collections.abc import Sequence

from hpcpipe.schedule.action import Action, Kind, Schedule


def forward(placement: Sequence[int], num_microbatches: int) -> Schedule:
    """Build a schedule that runs every microbatch forward through all stages, wherever they are.

    Actions stand in the order of a clock on which a microbatch starts as many turns after the one before as a rank has
    stages; that order is the same on all ranks, so no rank waits for a later action of another.

    Parameters
    ----------
    placement : sequence of int
        The rank of each stage.
    num_microbatches : int
        Microbatches that flow through, at least 1.
    """
    num_ranks = max(placement) + 1
    period = -(-len(placement) // num_ranks)
    lists: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
    for stage, rank in enumerate(placement):
        lists[rank] += [(stage + period * k, stage, k) for k in range(num_microbatches)]
    actions = tuple(tuple(Action(Kind.F, stage, k) for _, stage, k in sorted(turns)) for turns in lists)
    return Schedule("forward", num_microbatches, tuple(placement), actions)
