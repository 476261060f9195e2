"""Interleaved schedules: several stages per rank, in groups of microbatches."""

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.placement import looped
from hpcpipe.schedule.rank_list import RankList


def interleaved(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Build interleaved 1F1B (Narayanan et al., arXiv 2104.04473).

    Microbatches run in groups: a rank takes one group through its first chunk, then the same group through its second.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks p.
    num_microbatches : int
        Microbatches m per step; they must fall into equal groups of at least p, or all be one group.
    num_chunks : int
        Stages per rank v.

    Raises
    ------
    UsageError
        If the microbatches do not fall into equal groups; names the nearest numbers that do.
    """
    group = _group(num_ranks, num_microbatches)
    lists = []
    for rank in range(num_ranks):
        total = num_chunks * num_microbatches
        num_warmup = min(total, (num_chunks - 1) * group + 2 * (num_ranks - 1 - rank))
        rank_list = RankList(num_microbatches)
        for turn in range(total + num_warmup):
            if turn < total:
                rank_list.add(Kind.F, _stage(rank, num_ranks, turn // group % num_chunks))
            if turn >= num_warmup:
                chunk = num_chunks - 1 - (turn - num_warmup) // group % num_chunks
                rank_list.add(Kind.B, _stage(rank, num_ranks, chunk))
        lists.append(tuple(rank_list.actions))
    return Schedule("interleaved", num_microbatches, looped(num_ranks, num_chunks), tuple(lists))


def interleaved_zero_bubble(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Build the interleaved schedule with split backwards: half the warmup, weight gradients fill the cooldown.

    Parameters and errors as in `interleaved`. The stash holds p microbatches where p divides m.
    """
    group = _group(num_ranks, num_microbatches)
    lists = []
    for rank in range(num_ranks):
        total = num_chunks * num_microbatches
        num_warmup = min(total, (num_chunks - 1) * group + (num_ranks - 1 - rank))
        rank_list = RankList(num_microbatches)
        for turn in range(total + num_warmup):
            if turn < total:
                rank_list.add(Kind.F, _stage(rank, num_ranks, turn // group % num_chunks))
            if turn >= num_warmup:
                chunk = num_chunks - 1 - (turn - num_warmup) // group % num_chunks
                rank_list.postpone(_stage(rank, num_ranks, chunk))
                rank_list.weights(at_most=1 if turn - num_warmup >= rank else 0)
        rank_list.weights()
        lists.append(tuple(rank_list.actions))
    return Schedule("interleaved-zb", num_microbatches, looped(num_ranks, num_chunks), tuple(lists))


def _stage(rank: int, num_ranks: int, chunk: int) -> int:
    return chunk * num_ranks + rank


def _group(num_ranks: int, num_microbatches: int) -> int:
    """Return the size of a group of microbatches."""
    num_groups = max(1, num_microbatches // num_ranks)
    if num_microbatches % num_groups == 0:
        return num_microbatches // num_groups
    fitting = [m for m in range(1, 2 * num_microbatches) if m % max(1, m // num_ranks) == 0]
    below = max(m for m in fitting if m < num_microbatches)
    above = min(m for m in fitting if m > num_microbatches)
    raise UsageError(
        f"interleaved schedules on {num_ranks} ranks need microbatches that fall into equal groups of {num_ranks} or a"
        f" little more, and {num_microbatches} do not: set parallel.microbatches = {below} or {above}"
    )
