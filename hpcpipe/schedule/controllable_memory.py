"""V-Half and V-Min: a building block that repeats every six turns, for half or a third of 1F1B's memory.

The turns at which a rank starts its two forwards and two input gradients decide how long a stash lives, and so how many
there are at once (Qi et al., "Pipeline Parallelism with Controllable Memory", arXiv 2405.15362, section 4).
"""

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.placement import v_shaped
from hpcpipe.schedule.rank_list import RankList

_PERIOD = 6


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build V-Half: a stash of about half of 1F1B's on rank 0, for more bubble than ZB-V.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks p; rank r holds the stages r and 2p - 1 - r.
    num_microbatches : int
        Microbatches per step, at least 1.
    """
    p = num_ranks
    # The block must not put two actions of a rank into one turn; a shift of the backward prevents it.
    shift = 3 if p % 2 == 0 else 0
    starts = [(2 * r, 3 * p - r - 2, 3 * p + shift + 2 * r - 1, 6 * p + shift - r - 2) for r in range(p)]
    return _repeat("v-half", starts, num_microbatches)


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build V-Min: a stash of about a third of 1F1B's on rank 0, for still more bubble; parameters as in `v_half`."""
    p = num_ranks
    shift = 2 if p % 3 == 0 else 0
    starts = [(r, 2 * p - r - 1, 2 * p + shift + r, 4 * p + shift - r - 1) for r in range(p)]
    return _repeat("v-min", starts, num_microbatches)


def _repeat(name: str, starts: list[tuple[int, int, int, int]], num_microbatches: int) -> Schedule:
    """Lay the block of each microbatch `_PERIOD` turns after the one before; weight gradients take the free turns."""
    num_ranks = len(starts)
    lists = []
    for rank, block in enumerate(starts):
        down, up = rank, 2 * num_ranks - 1 - rank
        parts = ((Kind.F, down), (Kind.F, up), (Kind.I, up), (Kind.I, down))
        turns = sorted(
            (start + _PERIOD * k, kind, stage)
            for start, (kind, stage) in zip(block, parts, strict=True)
            for k in range(num_microbatches)
        )
        rank_list = RankList(num_microbatches)
        for (turn, kind, stage), (following, _, _) in zip(turns, [*turns[1:], (turns[-1][0] + 1, "", 0)], strict=True):
            if kind is Kind.F:
                rank_list.add(kind, stage)
            else:
                rank_list.postpone(stage)
            rank_list.weights(at_most=following - turn - 1)
        rank_list.weights()
        lists.append(tuple(rank_list.actions))
    return Schedule(name, num_microbatches, v_shaped(num_ranks), tuple(lists))
