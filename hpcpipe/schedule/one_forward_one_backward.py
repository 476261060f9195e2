"""1F1B: after a warmup of forwards, one forward and one backward in turn (PipeDream-Flush, arXiv 2006.09503)."""

from hpcpipe.schedule.action import Action, Kind, Schedule


def one_forward_one_backward(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the 1F1B schedule with one stage per rank.

    Rank r warms up with ``min(m, p - 1 - r)`` forwards, so its stash never holds more than ``p - r`` microbatches.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks p, one stage each.
    num_microbatches : int
        Microbatches m per step, at least 1.
    """
    lists = []
    for rank in range(num_ranks):
        num_warmup = min(num_microbatches, num_ranks - 1 - rank)
        actions = [Action(Kind.F, rank, k) for k in range(num_warmup)]
        for k in range(num_microbatches - num_warmup):
            actions += [Action(Kind.F, rank, num_warmup + k), Action(Kind.B, rank, k)]
        actions += [Action(Kind.B, rank, k) for k in range(num_microbatches - num_warmup, num_microbatches)]
        lists.append(tuple(actions))
    return Schedule("1f1b", num_microbatches, tuple(range(num_ranks)), tuple(lists))
