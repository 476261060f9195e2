"""What this rank's cores reach: operations of the unit for products, and bytes that are copied in memory."""

import time
from collections.abc import Callable

import numpy as np

from hpcpipe.kernels.gemm import matmul
from hpcpipe.kernels.threads import Team
from hpcpipe.memory.block import new_block

COPIED_BYTES = 256 << 20
"""Far more than caches hold."""
_SIZE = 384
_BURSTS = 12
_BURST_S = 0.01
_COPIES = 3
_PIECE_BYTES = 16 << 20
_PAGE = 4096
_DEPTHS = (128, 256, 512, 1024)

Work = tuple[Callable[[], float], float]
"""Something to repeat, which returns the processor time of the thread that took most of it, and its FLOPs."""


def peak_work(precision: str, team: Team) -> list[Work]:
    """Return products whose operands stay in cache, warm: the best of them is the peak.

    Parameters
    ----------
    precision : str
        ``f32``: the BLAS on one thread, as float32 layers use it. ``bf16``: blocks of the kernels' family, on all
        threads.
    team : Team
        The threads of the rank.
    """
    work = [_float32_work()] if precision == "f32" else [_bfloat16_work(team, depth) for depth in _DEPTHS]
    for run, _ in work:
        run()
    return work


def best_flops_per_s(work: list[Work]) -> float:
    """Return the best FLOP/s of several short bursts, per second of processor time of each thread.

    So the time that other programs take from the cores does not count; what they take from caches makes it look lower.
    """
    return max(_rate(run, flops) for run, flops in work for _ in range(_BURSTS // len(work)))


def peak_flops_per_s(precision: str, team: Team) -> float:
    """Return the peak of one rank on its own; parameters as for `peak_work`."""
    return best_flops_per_s(peak_work(precision, team))


def copy_bytes_per_s(team: Team, num_bytes: int = COPIED_BYTES) -> float:
    """Return the bytes that all threads read and write per second while they copy in memory.

    Pieces are timed, and what nine tenths of them do not reach counts: other programs only make it look lower than it
    is.

    Parameters
    ----------
    team : Team
        The threads of the rank.
    num_bytes : int
        Of the source, which is copied three times; each byte is read once and written once.
    """
    source, target = new_block(num_bytes), new_block(num_bytes)
    # The first time takes the memory from the machine.
    source.fill(1)
    target.fill(0)
    rates = []
    for start in [*range(0, num_bytes, _PIECE_BYTES)] * _COPIES:
        pieces = [array[start : start + _PIECE_BYTES] for array in (source, target)]
        begin = time.perf_counter()
        team.run(_copy, pieces[0].size, *pieces, grain=_PAGE)
        rates.append(2 * pieces[0].size / (time.perf_counter() - begin))
    return float(np.percentile(rates, 90))


def _copy(source: np.ndarray, target: np.ndarray, first: int, last: int) -> None:
    np.copyto(target[first:last], source[first:last])


def _rate(run: Callable[[], float], flops: float) -> float:
    """Return the FLOP/s of one burst."""
    count, taken = 0, 0.0
    while taken < _BURST_S:
        taken += run()
        count += 1
    return flops * count / taken


def _float32_work() -> Work:
    """Return a product of matrices."""
    a, b, out = (np.full((_SIZE, _SIZE), 0.5, np.float32) for _ in range(3))

    def run() -> float:
        start = time.thread_time()
        matmul(a, b, out)
        return time.thread_time() - start

    return run, 2.0 * _SIZE**3


def _bfloat16_work(team: Team, depth: int) -> Work:
    """Return some block products on every thread."""
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
    taken = [0.0] * team.num_threads

    # A thread's own clock is exact; that of the process lags behind for threads that run elsewhere.
    def part(thread: int, first: int, last: int) -> None:
        start = time.thread_time()
        repeat_block(*operands[thread], repetitions)
        taken[thread] = time.thread_time() - start

    def run() -> float:
        team.run(part, team.num_threads, private=range(team.num_threads), grain=1)
        return max(taken)

    return run, 2.0 * 32 * 32 * depth * repetitions * team.num_threads
