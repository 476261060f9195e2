"""V-Half and V-Min: a building block that repeats every six turns, for half or a third of 1F1B's memory.

The turns at which a rank starts its two forwards and two input gradients decide how long a stash lives, and so how many
there are at once (Qi et al., "Pipeline Parallelism with Controllable Memory", arXiv 2405.15362, section 4). Their order
is kept; weight gradients, for which nobody waits, go where a clock with F = I = W finds a gap or a full stash.

That cannot fail: when a forward finds the stash full and no weight gradient is left to run, the stashes are those whose
input gradients stand behind it in the block's order, and the block itself has room for it there. On the first stage,
whose backward is whole and fills gaps too, the forward may have to wait for a gradient, as it does in the block.
"""

import numpy as np

from hpcpipe.schedule.action import Action, Kind, Schedule
from hpcpipe.schedule.list_scheduler import Policy, arrange
from hpcpipe.schedule.placement import v_shaped
from hpcpipe.schedule.simulate import Costs

_PERIOD = 6


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build V-Half: a stash of at most ``(p + 2) // 2`` microbatches and half of 1F1B's bubble at F = I = W.

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
    return _repeat("v-half", starts, num_microbatches, (p + 2) // 2)


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build V-Min: a stash of at most ``(p + 4) // 3`` microbatches, for more bubble; parameters as in `v_half`."""
    p = num_ranks
    shift = 2 if p % 3 == 0 else 0
    starts = [(r, 2 * p - r - 1, 2 * p + shift + r, 4 * p + shift - r - 1) for r in range(p)]
    return _repeat("v-min", starts, num_microbatches, (p + 4) // 3)


def _repeat(name: str, starts: list[tuple[int, int, int, int]], num_microbatches: int, max_stash: int) -> Schedule:
    """Lay the block of each microbatch `_PERIOD` turns after the one before; weight gradients fill the gaps."""
    num_ranks = len(starts)
    orders = []
    for rank, block in enumerate(starts):
        down, up = rank, 2 * num_ranks - 1 - rank
        parts = ((Kind.F, down), (Kind.F, up), (Kind.I, up), (Kind.I, down))
        actions = [Action(kind, stage, k) for k in range(num_microbatches) for kind, stage in parts]
        turns = np.add.outer(_PERIOD * np.arange(num_microbatches), block).reshape(-1)
        orders.append([actions[index] for index in np.argsort(turns, kind="stable").tolist()])
    placement = v_shaped(num_ranks)
    policy = Policy(alternate=True, patience=0.0, overhang=0.0, first_stage_late=True)
    costs = Costs.even(num_ranks, len(placement))
    arranged = arrange(placement, num_microbatches, policy, orders, costs, [2 * max_stash] * num_ranks)
    assert arranged is not None
    return Schedule(name, num_microbatches, placement, arranged[1])
