"""The forward-only schedule of evaluation and generation."""

from hpcpipe.schedule.action import Action, Kind, Schedule


def forward(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build a schedule that runs every microbatch forward through one stage per rank.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks, one stage each.
    num_microbatches : int
        Microbatches that flow through, at least 1.
    """
    actions = tuple(tuple(Action(Kind.F, rank, k) for k in range(num_microbatches)) for rank in range(num_ranks))
    return Schedule("forward", num_microbatches, tuple(range(num_ranks)), actions)
