"""The peak that MFU is measured against: what the processor's unit for products reaches with all ranks busy."""

import time
from collections.abc import Callable

import numpy as np

from hpcpipe.kernels.gemm import matmul
from hpcpipe.kernels.threads import Team
from hpcpipe.memory.block import new_block
from hpcpipe.mpi.collectives import barrier, gather_rows
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter

_SIZE = 384
_BURSTS = 12
_BURST_S = 0.01
_DEPTHS = (128, 256, 512, 1024)


def measure_peak_flops(grid: Grid, waiter: Waiter, precision: str, team: Team) -> float:
    """Return the FLOP/s of all ranks together in products whose operands stay in cache.

    All ranks measure at the same time, so ranks that share a core count it about once. The best of several short
    bursts counts: other programs on the machine only make it look slower than it is.

    Parameters
    ----------
    grid : Grid
        All ranks call it.
    waiter : Waiter
        Waits, with its deadline.
    precision : str
        ``f32``: the BLAS on one thread, as float32 layers use it. ``bf16``: blocks of the kernels' family, on all
        threads.
    team : Team
        The threads of the rank.
    """
    work = [_float32_work()] if precision == "f32" else [_bfloat16_work(team, depth) for depth in _DEPTHS]
    for run, _ in work:
        run()
    barrier(grid.comm, waiter)
    best = max(_rate(run, flops) for run, flops in work for _ in range(_BURSTS // len(work)))
    return float(gather_rows(grid.comm, waiter, np.array([best])).sum())


def _rate(run: Callable[[], None], flops: float) -> float:
    """Return the FLOP/s of one burst."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < _BURST_S:
        run()
        count += 1
    return flops * count / (time.perf_counter() - start)


def _float32_work() -> tuple[Callable[[], None], float]:
    """Return a product of matrices, and its FLOPs."""
    a, b, out = (np.full((_SIZE, _SIZE), 0.5, np.float32) for _ in range(3))
    return lambda: matmul(a, b, out), 2.0 * _SIZE**3


def _bfloat16_work(team: Team, depth: int) -> tuple[Callable[[], None], float]:
    """Return some block products on every thread, and their FLOPs."""
    from hpcpipe.kernels.peak import repeat_block

    repetitions = (1 << 15) // depth
    operands = [
        (
            new_block(32 * depth * 2).view(np.uint16).reshape(32, depth),
            new_block(32 * depth * 2).view(np.uint16),
            new_block(4096).view(np.float32).reshape(32, 32),
        )
        for _ in range(team.num_threads)
    ]

    def part(own: tuple[np.ndarray, np.ndarray, np.ndarray], first: int, last: int) -> None:
        repeat_block(*own, repetitions)

    flops = 2.0 * 32 * 32 * depth * repetitions * team.num_threads
    return lambda: team.run(part, team.num_threads, private=operands, grain=1), flops
