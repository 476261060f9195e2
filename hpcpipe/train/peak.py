"""What all ranks together reach: the peak that MFU is measured against, and the bandwidth of their memory."""

import numpy as np

from hpcpipe.kernels.threads import Team
from hpcpipe.mpi.collectives import barrier, gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.rates import COPIED_BYTES, best_flops_per_s, copy_bytes_per_s, peak_work

_LEAST_BYTES = 32 << 20


def measure_peak_flops(grid: Grid, waiter: Waiter, precision: str, team: Team, share: float) -> float:
    """Return the FLOP/s of all ranks together in products whose operands stay in cache.

    All ranks measure at the same time, as they compute. The best of several short bursts counts, in processor time:
    what other programs take from the cores does not make the peak look lower.

    Parameters
    ----------
    grid : Grid
        All ranks call it.
    waiter : Waiter
        Waits, with its deadline.
    precision : str
        ``f32`` or ``bf16``, see `hpcpipe.train.rates.peak_work`.
    team : Team
        The threads of the rank.
    share : float
        Of a core that a thread has: less than 1 where threads share cores.
    """
    work = peak_work(precision, team)
    barrier(grid.comm, waiter)
    best = share * best_flops_per_s(work)
    return float(gather_rows(grid.comm, waiter, np.array([best])).sum())


def measure_bandwidth(grid: Grid, waiter: Waiter, num_local_ranks: int, team: Team) -> float:
    """Return the bytes that all ranks together read and write per second while they copy in memory.

    Parameters
    ----------
    grid : Grid
        All ranks call it, and copy at the same time.
    waiter : Waiter
        Waits, with its deadline.
    num_local_ranks : int
        Ranks of this node, which share its memory.
    team : Team
        The threads of the rank.
    """
    barrier(grid.comm, waiter)
    best = copy_bytes_per_s(team, max(_LEAST_BYTES, COPIED_BYTES // num_local_ranks))
    return float(gather_rows(grid.comm, waiter, np.array([best])).sum())
