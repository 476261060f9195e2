"""``hpcpipe bench``: measure parts of hpcpipe on this machine."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpcpipe.cli.parser import path
from hpcpipe.errors import ExitCode

if TYPE_CHECKING:
    from hpcpipe.train.bench_result import BenchResult

ALONE = ("gemm",)
"""Benchmarks of one process."""

_SCHEDULES = ("1f1b", "zb-h1", "interleaved", "zb-v")
_ACTIONS = """\
Measure what the executor itself costs per action: it walks real schedules on stages that compute nothing. Alone,
one process walks the lists of all ranks, without messages; under `hpcpipe launch -n N bench actions` every rank
walks its own, with real messages, and what it waits for them is left out."""
_GEMM = """\
Measure the kernels of a model, each on its own: matrix products in all three uses against the measured peak of the
unit that computes them, attention, and what is bound by memory against a measured copy. In one process; without
CONFIG for GPT-2 124M and one sample of 512 tokens."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the verb and its benchmarks to the command's parser."""
    verb = subparsers.add_parser("bench", help="measure parts of hpcpipe on this machine", description=__doc__)
    benchmarks = verb.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_actions(benchmarks)
    _add_gemm(benchmarks)


def _add_actions(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    actions = benchmarks.add_parser("actions", help="what the executor costs per action", description=_ACTIONS)
    actions.add_argument(
        "--schedule",
        action="append",
        dest="schedules",
        metavar="NAME",
        help=f"a schedule; may be given several times (default {', '.join(_SCHEDULES)})",
    )
    actions.add_argument("--ranks", type=int, metavar="P", help="ranks of the pipeline (default: those started, or 4)")
    actions.add_argument("--microbatches", type=int, default=32, metavar="M", help="of a step (default 32)")
    actions.add_argument("--repetitions", type=int, default=30, metavar="R", help="walks of each list (default 30)")
    _add_json(actions)
    actions.set_defaults(run=run_actions)


def _add_gemm(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    gemm = benchmarks.add_parser("gemm", help="what the kernels of a model reach", description=_GEMM)
    gemm.add_argument("config", type=path, nargs="?", metavar="CONFIG", help="TOML file; gives model and microbatch")
    gemm.add_argument("--precision", choices=("bf16", "f32"), help="default: the configuration's")
    gemm.add_argument("--threads", type=int, default=1, metavar="T", help="with 2 or more, beside one (default 1)")
    gemm.add_argument("--rows", type=int, metavar="R", help="default: microbatch_size x context")
    gemm.add_argument("--repetitions", type=int, default=15, metavar="N", help="calls of each kernel (default 15)")
    _add_json(gemm)
    gemm.set_defaults(run=run_gemm)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_actions(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe bench actions``; every rank runs this.

    Parameters
    ----------
    args : argparse.Namespace
        ``schedules``, ``ranks``, ``microbatches``, ``repetitions``, ``json``.

    Returns
    -------
    int
        Exit code 0, or that of an error which all ranks met.

    Raises
    ------
    UsageError
        There is no such schedule for these numbers, or not as many ranks were started.
    """
    _limit_threads()
    from hpcpipe.cli.bench_tables import print_actions
    from hpcpipe.train.bench_actions import bench_actions

    result = bench_actions(args.schedules or _SCHEDULES, args.ranks, args.microbatches, args.repetitions)
    return _tell(result, args.json, print_actions)


def run_gemm(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe bench gemm``.

    Parameters
    ----------
    args : argparse.Namespace
        ``config``, ``precision``, ``threads``, ``rows``, ``repetitions``, ``json``.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    UsageError
        See `hpcpipe.train.bench_gemm.bench_gemm`.
    """
    _limit_threads()
    from hpcpipe.cli.bench_tables import print_gemm
    from hpcpipe.train.bench_gemm import bench_gemm
    from hpcpipe.train.bench_result import BenchResult

    report = bench_gemm(args.config, args.precision, args.threads, args.rows, args.repetitions, _say_compiling)
    return _tell(BenchResult(ExitCode.DONE, report), args.json, print_gemm)


def _limit_threads() -> None:
    """Keep BLAS to one thread, before numpy is imported."""
    from hpcpipe.cluster.environment import limit_blas_threads

    limit_blas_threads()


def _say_compiling(name: str, index: int, total: int) -> None:
    print(f"compiling kernels for this processor, once: {index}/{total} {name}", file=sys.stderr, flush=True)


def _tell(result: "BenchResult", as_json: bool, print_table: Callable[[dict[str, Any]], None]) -> int:
    """Print a report, on the rank that has one."""
    if result.report is not None and as_json:
        print(json.dumps(result.report, indent=1))
    elif result.report is not None:
        print_table(result.report)
    return int(result.code)
