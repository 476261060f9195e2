"""The peak that MFU is measured against: what the machine's matrix product reaches with all ranks busy."""

import time

import numpy as np

from hpcpipe.kernels.gemm import matmul
from hpcpipe.mpi.collectives import barrier, gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter

_SIZE = 384
_BURSTS = 12
_BURST_S = 0.01


def measure_peak_flops(grid: Grid, waiter: Waiter) -> float:
    """Return the FLOP/s of all ranks together in a float32 matrix product that stays in cache.

    All ranks measure at the same time, so ranks that share a core count it about once. The best of several short
    bursts counts: other programs on the machine only make it look slower than it is.
    """
    a, b, out = (np.full((_SIZE, _SIZE), 0.5, np.float32) for _ in range(3))
    matmul(a, b, out)
    barrier(grid.comm, waiter)
    best = 0.0
    for _ in range(_BURSTS):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < _BURST_S:
            matmul(a, b, out)
            count += 1
        best = max(best, 2.0 * _SIZE**3 * count / (time.perf_counter() - start))
    return float(gather_rows(grid.comm, waiter, np.array([best])).sum())
