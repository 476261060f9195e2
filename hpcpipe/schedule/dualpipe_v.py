"""DualPipeV: forwards and backwards of two directions in turn (DeepSeek-AI; Sea AI Lab's cut in half of DualPipe)."""

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Action, Kind, Schedule
from hpcpipe.schedule.placement import v_shaped
from hpcpipe.schedule.rank_list import RankList


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build DualPipeV; a forward and a backward that it would overlap stand one after the other.

    Parameters
    ----------
    num_ranks : int
        Pipeline ranks p; rank r holds the stages r and 2p - 1 - r.
    num_microbatches : int
        Microbatches per step, at least 2p.

    Raises
    ------
    UsageError
        If there are fewer than 2p microbatches.
    """
    p, m = num_ranks, num_microbatches
    if m < 2 * p:
        raise UsageError(
            f"dualpipe-v on {p} ranks needs at least {2 * p} microbatches, not {m}: set parallel.microbatches ="
            f" {2 * p} or another parallel.schedule"
        )
    lists = tuple(tuple(_actions(rank, p, m)) for rank in range(p))
    return Schedule("dualpipe-v", m, v_shaped(p), lists)


def _actions(rank: int, p: int, m: int) -> list[Action]:
    rank_list = RankList(m)
    down, up = rank, 2 * p - 1 - rank
    behind = p - rank - 1

    for _ in range(2 * behind):
        rank_list.add(Kind.F, down)
    for _ in range(rank + 1):
        rank_list.add(Kind.F, down)
        rank_list.add(Kind.F, up)
    for _ in range(behind):
        rank_list.postpone(up)
        rank_list.weights(at_most=1)
        rank_list.add(Kind.F, up)
    for _ in range(m - 2 * p + rank + 1):
        rank_list.add(Kind.F, down)
        rank_list.add(Kind.B, up)
        rank_list.add(Kind.F, up)
        rank_list.add(Kind.B, down)
    for _ in range(behind):
        rank_list.add(Kind.B, up)
        rank_list.add(Kind.F, up)
        rank_list.add(Kind.B, down)

    # Half way through the last backwards their weight halves are kept for the gaps of the cooldown.
    num_whole = rank + 1
    for turn in range(2 * (rank + 1)):
        stage = down if turn % 2 else up
        if turn < num_whole:
            rank_list.add(Kind.B, stage)
        else:
            rank_list.postpone(stage)
    for _ in range(behind):
        rank_list.weights(at_most=1)
        rank_list.postpone(down)
    rank_list.weights()
    return rank_list.actions
