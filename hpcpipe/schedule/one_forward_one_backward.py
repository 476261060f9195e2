"""1F1B and its eager form: after a warmup of forwards, one forward and one backward in turn."""

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.placement import looped
from hpcpipe.schedule.rank_list import RankList


def one_forward_one_backward(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the 1F1B schedule (PipeDream-Flush, arXiv 2006.09503).

    Rank r warms up with ``min(m, p - 1 - r)`` forwards, so its stash never holds more than ``p - r`` microbatches.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks p, one stage each.
    num_microbatches : int
        Microbatches m per step, at least 1.
    """
    return _alternate("1f1b", num_ranks, num_microbatches, warmup_per_rank=1)


def eager_one_forward_one_backward(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build 1F1B with twice the warmup, so that messages have a turn's time to travel (JaxPP, arXiv 2412.14374).

    The stash of rank r holds up to ``2 (p - 1 - r) + 1`` microbatches.
    """
    return _alternate("eager-1f1b", num_ranks, num_microbatches, warmup_per_rank=2)


def _alternate(name: str, num_ranks: int, num_microbatches: int, warmup_per_rank: int) -> Schedule:
    lists = []
    for rank in range(num_ranks):
        num_warmup = min(num_microbatches, warmup_per_rank * (num_ranks - 1 - rank))
        rank_list = RankList(num_microbatches)
        for _ in range(num_warmup):
            rank_list.add(Kind.F, rank)
        for _ in range(num_microbatches):
            rank_list.add(Kind.F, rank)
            rank_list.add(Kind.B, rank)
        lists.append(tuple(rank_list.actions))
    return Schedule(name, num_microbatches, looped(num_ranks, 1), tuple(lists))
