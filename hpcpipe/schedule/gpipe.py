"""GPipe: all forwards, then all backwards (Huang et al., arXiv 1811.06965)."""

from hpcpipe.schedule.action import Action, Kind, Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the GPipe schedule with one stage per rank.

    The backwards ascend like the forwards, so that weight gradients accumulate in the order of every other schedule.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks, one stage each.
    num_microbatches : int
        Microbatches per step, at least 1.
    """
    microbatches = range(num_microbatches)
    actions = tuple(
        (*(Action(Kind.F, rank, k) for k in microbatches), *(Action(Kind.B, rank, k) for k in microbatches))
        for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_microbatches, tuple(range(num_ranks)), actions)
