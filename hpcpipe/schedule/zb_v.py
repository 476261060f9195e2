"""ZB-V: two stages per rank in a V, weight gradients in every gap (Qi et al., arXiv 2405.15362)."""

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.placement import v_shaped
from hpcpipe.schedule.rank_list import RankList


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build ZB-V: the stash of 1F1B's rank 0 on every rank, no waiting between first and last action at F = I = W.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks p; rank r holds the stages r and 2p - 1 - r.
    num_microbatches : int
        Microbatches per step, at least 1. The pattern is that of at least 2p - 1, its surplus left out.
    """
    lists = []
    for rank in range(num_ranks):
        down, up = rank, 2 * num_ranks - 1 - rank
        total = max(num_microbatches, 2 * num_ranks - 1)
        rank_list = RankList(num_microbatches)

        def whole_backward(stage: int, rank_list: RankList = rank_list) -> None:
            rank_list.add(Kind.I, stage)
            rank_list.add(Kind.W, stage)

        for _ in range(2 * (num_ranks - rank) - 1):
            rank_list.add(Kind.F, down)
        for _ in range(rank):
            rank_list.add(Kind.F, up)
            rank_list.add(Kind.F, down)
        for _ in range(num_ranks - rank):
            rank_list.add(Kind.F, up)
            whole_backward(up)
        while rank_list.count(Kind.F, up) < rank_list.count(Kind.F, down) or rank_list.count(Kind.F, down) < total:
            if rank_list.count(Kind.F, down) < total:
                rank_list.add(Kind.F, down)
            whole_backward(down)
            rank_list.add(Kind.F, up)
            whole_backward(up)
        for _ in range(rank):
            rank_list.add(Kind.I, down)
            rank_list.add(Kind.I, up)
        for _ in range(num_ranks - rank):
            whole_backward(down)
        for stage in (up, down):
            while rank_list.count(Kind.W, stage) < total:
                rank_list.add(Kind.W, stage)
        lists.append(tuple(rank_list.actions))
    return Schedule("zb-v", num_microbatches, v_shaped(num_ranks), tuple(lists))
