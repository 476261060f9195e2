"""ZB-H1 and ZB-H2: the backward in halves, weight gradients where a rank would wait (Qi et al., arXiv 2401.10241)."""

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.placement import looped
from hpcpipe.schedule.rank_list import RankList


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build ZB-H1: the memory of 1F1B's rank 0 on every rank, a bubble of ``(p - 1)(F + I - W)``.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks p, one stage each.
    num_microbatches : int
        Microbatches m per step, at least 1.
    """
    return _build("zb-h1", num_ranks, num_microbatches, warmup_per_rank=1)


def zb_h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build ZB-H2: no waiting between first and last action where F = I = W, for a stash of ``2p - 1`` microbatches."""
    return _build("zb-h2", num_ranks, num_microbatches, warmup_per_rank=2)


def _build(name: str, num_ranks: int, num_microbatches: int, warmup_per_rank: int) -> Schedule:
    lists = []
    for rank in range(num_ranks):
        rank_list = RankList(num_microbatches)
        for _ in range(min(num_microbatches, warmup_per_rank * (num_ranks - 1 - rank))):
            rank_list.add(Kind.F, rank)
        for k in range(num_microbatches):
            rank_list.add(Kind.F, rank)
            rank_list.postpone(rank)
            rank_list.weights(at_most=1 if k >= warmup_per_rank * rank else 0)
        rank_list.weights()
        lists.append(tuple(rank_list.actions))
    return Schedule(name, num_microbatches, looped(num_ranks, 1), tuple(lists))
