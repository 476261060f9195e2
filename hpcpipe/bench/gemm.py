"""``hpcpipe bench gemm``: what the kernels of a model reach on this processor, each on its own."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe.bench.cases import MEMORY, NAME, PRODUCTS, Case, Run, Shape, build_cases
from hpcpipe.bench.config import load_for_any_grid, with_vocabulary
from hpcpipe.cluster.binding import bind
from hpcpipe.cluster.environment import rank_hint
from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig
from hpcpipe.errors import UsageError
from hpcpipe.kernels import features, warm
from hpcpipe.kernels.observe import ObservedTeam, Observer
from hpcpipe.kernels.threads import Team
from hpcpipe.kernels.work import NOTHING, Work
from hpcpipe.memory.block import allocated_bytes
from hpcpipe.train.rates import copy_bytes_per_s, peak_flops_per_s

GPT2 = Config(
    model=ModelConfig(layers=12, width=768, heads=12, context=512, vocab=50257),
    parallel=ParallelConfig(microbatch_size=1),
)
"""What is measured without a configuration: GPT-2 124M, one sample of 512 tokens."""

_COLD_BYTES = 256 << 20
_MOST_SETS = 256

Report = Callable[[str, int, int], None]


def bench_gemm(
    config_path: Path | None = None,
    precision: str | None = None,
    num_threads: int = 1,
    rows: int | None = None,
    repetitions: int = 15,
    report_compiling: Report | None = None,
) -> dict[str, Any]:
    """Time the products of a model in all three uses, attention, and what is bound by memory, in this process.

    Products and attention read operands as warm as caches keep them from call to call. What is bound by memory goes
    round sets of buffers of 256 MiB together, so that caches do not hold them. With several threads each repetition
    calls a kernel on one thread and on all, in turn.

    Parameters
    ----------
    config_path : Path or None
        Gives model, microbatch and precision; None for GPT-2 124M with 512 rows.
    precision : str or None
        ``bf16`` or ``f32``; None for what the configuration says.
    num_threads : int
        Threads, at least 1.
    rows : int or None
        Rows of activations; None for ``parallel.microbatch_size`` times ``model.context``.
    repetitions : int
        Calls of each kernel that count, at least 1.
    report_compiling : callable, optional
        As for `hpcpipe.kernels.warm.compile_all`, if something has to be compiled.

    Returns
    -------
    dict
        ``benchmark precision unit threads rows model repetitions``; ``peak_flops``, the FLOP/s of all threads on
        operands that stay in cache; ``copy_bytes_per_s``, read and written by a copy in memory;
        ``products_flops_per_s`` and ``products_of_peak`` of all products together; and ``kernels``, one object each:
        ``group`` (``products``, ``attention`` or ``memory``), ``name``, ``use``, ``end`` (what is done with the result
        in the same call), ``shape`` (rows, contraction, columns of a product), ``flops`` and ``bytes`` per call (as
        `hpcpipe.kernels.work` counts them: in attention only visible scores), ``median_s p10_s p90_s``,
        ``flops_per_s of_peak`` (None without products), ``bytes_per_s of_copy``, and ``one_thread_s speedup`` (None on
        one thread). Fractions, not percent.

    Raises
    ------
    UsageError
        An argument is wrong, or several ranks were started.
    """
    _check(num_threads, repetitions)
    config = GPT2 if config_path is None else with_vocabulary(load_for_any_grid(config_path))
    precision = _precision(precision or config.train.precision)
    if precision == "f32" and num_threads > 1:
        raise UsageError(f"--threads {num_threads}: float32 computes on one thread, leave --threads out")
    shape = _shape(config, rows, num_threads)
    warm.compile_all(None if warm.is_compiled(precision) else report_compiling, precision)
    alone, team = Team(1), Team(num_threads, _own_cores(num_threads))
    team.prepare()
    try:
        peak = peak_flops_per_s(precision, team)
        copied = copy_bytes_per_s(team)
        cases = build_cases(shape, precision)
        measured = [_measure(case, [alone, team][2 - min(2, num_threads) :], repetitions) for case in cases]
        # The better of two times, since other programs only make a machine look slower.
        peak, copied = max(peak, peak_flops_per_s(precision, team)), max(copied, copy_bytes_per_s(team))
    finally:
        team.close()
    return {
        "benchmark": "gemm",
        "precision": precision,
        "unit": unit_of(precision),
        "threads": num_threads,
        "rows": shape.rows,
        "model": asdict(shape.model),
        "repetitions": repetitions,
        "peak_flops": peak,
        "copy_bytes_per_s": copied,
        **_figures(cases, measured, peak, copied),
    }


def unit_of(precision: str) -> str:
    """Return what multiplies matrices: the family of kernels, or ``blas``."""
    return features.family() if precision == "bf16" else "blas"


def _check(num_threads: int, repetitions: int) -> None:
    hint = rank_hint()
    if hint is not None and hint[1] > 1:
        raise UsageError(f"bench gemm measures one process, and {hint[1]} ranks were started: run it by itself")
    if num_threads < 1:
        raise UsageError(f"--threads {num_threads}: at least 1 is needed")
    if repetitions < 1:
        raise UsageError(f"--repetitions {repetitions}: at least 1 is needed")


def _precision(precision: str) -> str:
    if precision == "auto":
        return "bf16" if features.has_bf16_unit() else "f32"
    return precision


def _shape(config: Config, rows: int | None, num_threads: int) -> Shape:
    """Cut rows into samples: whole ones, or a part of one."""
    context = config.model.context
    if rows is None:
        rows = config.parallel.microbatch_size * context
    if rows < 1 or (rows > context and rows % context):
        raise UsageError(
            f"--rows {rows}: whole samples of model.context = {context} tokens are measured, or a part of one: give"
            f" 1 to {context}, or a multiple of {context}"
        )
    context = min(context, rows)
    return Shape(config.model, rows // context, context, num_threads)


def _own_cores(num_threads: int) -> Sequence[frozenset[int]]:
    """Return the cores of this process, if they are enough for a thread each."""
    return bind([0], [frozenset(os.sched_getaffinity(0))], num_threads).own_cores(0)


def _measure(case: Case, teams: Sequence[Team], repetitions: int) -> tuple[Work, list[list[float]]]:
    """Return what a call has to do, and for each team the seconds of each call."""
    observer, before = Observer(), allocated_bytes().get(NAME, 0)
    runs = [case.make()]
    with observer.watch():
        runs[0](ObservedTeam(observer, 1))
    work = NOTHING
    for tally in observer.kernels.values():
        work = work.plus(tally.work)
    if case.group == MEMORY:
        num_sets = _COLD_BYTES // (allocated_bytes()[NAME] - before)
        runs += [case.make() for _ in range(min(num_sets, _MOST_SETS) - 1)]
    for run in runs:
        for team in teams:
            run(team)
    taken: list[list[float]] = [[] for _ in teams]
    turn = 0
    for _ in range(repetitions):
        for team, seconds in zip(teams, taken, strict=True):
            seconds.append(_seconds(runs[turn % len(runs)], team))
            turn += 1
    return work, taken


def _seconds(run: Run, team: Team) -> float:
    start = time.perf_counter()
    run(team)
    return time.perf_counter() - start


def _figures(
    cases: Sequence[Case], measured: Sequence[tuple[Work, list[list[float]]]], peak: float, copied: float
) -> dict[str, Any]:
    """Return a row for each case, and the rate of all products together."""
    kernels = [_row(case, *figures, peak, copied) for case, figures in zip(cases, measured, strict=True)]
    products = [row for row in kernels if row["group"] == PRODUCTS]
    together = sum(row["flops"] for row in products) / sum(row["median_s"] for row in products)
    return {"products_flops_per_s": together, "products_of_peak": together / peak, "kernels": kernels}


def _row(case: Case, work: Work, taken: list[list[float]], peak: float, copied: float) -> dict[str, Any]:
    low, median, high = (float(figure) for figure in np.percentile(taken[-1], (10, 50, 90)))
    one = float(np.median(taken[0])) if len(taken) > 1 else None
    flops_per_s = work.flops / median if work.flops else None
    return {
        "group": case.group,
        "name": case.name,
        "use": case.use,
        "end": case.end,
        "shape": list(case.shape),
        "flops": work.flops,
        "bytes": work.num_bytes,
        "median_s": median,
        "p10_s": low,
        "p90_s": high,
        "flops_per_s": flops_per_s,
        "of_peak": None if flops_per_s is None else flops_per_s / peak,
        "bytes_per_s": work.num_bytes / median,
        "of_copy": work.num_bytes / median / copied,
        "one_thread_s": one,
        "speedup": None if one is None else one / median,
    }
