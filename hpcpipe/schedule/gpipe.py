"""GPipe and its form with chunks: all forwards, then all backwards."""

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.placement import looped
from hpcpipe.schedule.rank_list import RankList


def gpipe(num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """Build the GPipe schedule (Huang et al., arXiv 1811.06965).

    The backwards ascend like the forwards, so that weight gradients accumulate in the order of every other schedule.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks.
    num_microbatches : int
        Microbatches per step, at least 1.
    num_chunks : int
        Stages per rank; more than one makes it the breadth-first schedule, see `looped_bfs`.
    """
    lists = []
    for rank in range(num_ranks):
        rank_list = RankList(num_microbatches)
        stages = range(rank, num_ranks * num_chunks, num_ranks)
        for kind, order in ((Kind.F, stages), (Kind.B, reversed(stages))):
            for stage in order:
                for _ in range(num_microbatches):
                    rank_list.add(kind, stage)
        lists.append(tuple(rank_list.actions))
    name = "gpipe" if num_chunks == 1 else "looped-bfs"
    return Schedule(name, num_microbatches, looped(num_ranks, num_chunks), tuple(lists))


def looped_bfs(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Build the breadth-first schedule: chunk after chunk, all microbatches each (Lamy-Poirier, arXiv 2211.05953)."""
    return gpipe(num_ranks, num_microbatches, num_chunks)
