"""``hpcpipe bench``: measure parts of hpcpipe on this machine."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpcpipe.cli.parser import path
from hpcpipe.errors import ExitCode

if TYPE_CHECKING:
    from hpcpipe.bench.result import BenchResult

ALONE, TOGETHER = ("gemm",), ("p2p",)
"""Benchmarks of one process, and of several ranks only."""

_SCHEDULES = ("1f1b", "zb-h1", "interleaved", "zb-v")
_ACTIONS = """\
Measure what the executor itself costs per action: it walks real schedules on stages that compute nothing. Alone,
one process walks the lists of all ranks, without messages; under `hpcpipe launch -n N bench actions` every rank
walks its own, with real messages, and what it waits for them is left out."""
_GEMM = """\
Measure the kernels of a model, each on its own: matrix products in all three uses against the measured peak of the
unit that computes them, attention, and what is bound by memory against a measured copy. In one process; without
CONFIG for GPT-2 124M and one sample of 512 tokens."""

_STEP = """\
Run training steps on random tokens as a run does, without data and without a run directory: tokens per second, model
FLOP utilisation, what ranks wait for, and the time of each kernel beside what it would take at the peak and at the
bandwidth of memory. Alone or under `hpcpipe launch -n N bench step CONFIG`."""

_P2P = """\
Measure the messages between neighbours in a pipeline, sent as the trainer sends them: one way, and both ways at the
same time. Under `hpcpipe launch -n 2 bench p2p`; with more ranks all pairs send at the same time."""
_CHECKPOINT = """\
Write and restore checkpoints of a model, and move the same bytes with dd to and from the same disk, in turn: what
training waits for, bandwidths, and their part of dd's. Writes below run.dir, and removes what it has written. Alone or
under `hpcpipe launch -n N bench checkpoint CONFIG`."""
_SHIFTS = {"": 0, "KiB": 10, "MiB": 20}


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the verb and its benchmarks to the command's parser."""
    verb = subparsers.add_parser(
        "bench",
        help="measure parts of hpcpipe on this machine",
        description="Measure parts of hpcpipe on this machine.",
    )
    benchmarks = verb.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_actions(benchmarks)
    _add_gemm(benchmarks)
    _add_step(benchmarks)
    _add_p2p(benchmarks)
    _add_checkpoint(benchmarks)


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


def _add_step(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    step = benchmarks.add_parser("step", help="what training steps take, and where the time goes", description=_STEP)
    step.add_argument("config", type=path, metavar="CONFIG", help="TOML file, such as configs/quickstart.toml")
    step.add_argument("--steps", type=int, default=5, metavar="N", help="steps that are timed (default 5)")
    _add_overrides(step)
    _add_json(step)
    step.set_defaults(run=run_step)


def _add_p2p(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    p2p = benchmarks.add_parser("p2p", help="what messages between neighbours take", description=_P2P)
    p2p.add_argument(
        "config", type=path, nargs="?", metavar="CONFIG", help="TOML file; adds its residual stream's size"
    )
    p2p.add_argument(
        "--sizes",
        type=_sizes,
        metavar="BYTES,...",
        help="sizes of messages, such as 1KiB,300000,64MiB (default 1 KiB to 64 MiB)",
    )
    _add_overrides(p2p)
    _add_json(p2p)
    p2p.set_defaults(run=run_p2p)


def _add_checkpoint(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    checkpoint = benchmarks.add_parser("checkpoint", help="what checkpoints take, beside dd", description=_CHECKPOINT)
    checkpoint.add_argument("config", type=path, metavar="CONFIG", help="TOML file; gives model, grid and run.dir")
    checkpoint.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that count (default 5)")
    _add_overrides(checkpoint)
    _add_json(checkpoint)
    checkpoint.set_defaults(run=run_checkpoint)


def _sizes(text: str) -> tuple[int, ...]:
    """Read sizes of messages."""
    sizes = []
    for word in text.split(","):
        found = re.fullmatch(r"([0-9]{1,12})(|KiB|MiB)", word.strip())
        if not found:
            raise argparse.ArgumentTypeError(f"{word!r} is no number of bytes, such as 1024, 16KiB or 4MiB")
        sizes.append(int(found[1]) << _SHIFTS[found[2]])
    return tuple(sizes)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="override a key of the configuration; may be given several times",
    )


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
    from hpcpipe.bench.actions import bench_actions
    from hpcpipe.cli.bench_tables import print_actions

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
        See `hpcpipe.bench.gemm.bench_gemm`.
    """
    _limit_threads()
    from hpcpipe.bench.gemm import bench_gemm
    from hpcpipe.bench.result import BenchResult
    from hpcpipe.cli.bench_tables import print_gemm

    report = bench_gemm(args.config, args.precision, args.threads, args.rows, args.repetitions, _say_compiling)
    return _tell(BenchResult(ExitCode.DONE, report), args.json, print_gemm)


def run_step(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe bench step``; every rank runs this.

    Parameters
    ----------
    args : argparse.Namespace
        ``config``, ``overrides``, ``steps``, ``json``.

    Returns
    -------
    int
        Exit code 0, or that of an error which all ranks met.

    Raises
    ------
    UsageError
        There are no steps to time.
    """
    _limit_threads()
    from hpcpipe.bench.step import bench_step
    from hpcpipe.cli.bench_tables import print_step

    return _tell(bench_step(args.config, args.overrides, args.steps, _say), args.json, print_step)


def run_p2p(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe bench p2p``; every rank runs this.

    Parameters
    ----------
    args : argparse.Namespace
        ``config``, ``overrides``, ``sizes``, ``json``.

    Returns
    -------
    int
        Exit code 0, or that of an error which all ranks met.

    Raises
    ------
    UsageError
        There is only one rank.
    """
    _limit_threads()
    from hpcpipe.bench.p2p import SIZES, bench_p2p
    from hpcpipe.cli.bench_tables import print_p2p

    return _tell(bench_p2p(args.sizes or SIZES, args.config, args.overrides), args.json, print_p2p)


def run_checkpoint(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe bench checkpoint``; every rank runs this.

    Parameters
    ----------
    args : argparse.Namespace
        ``config``, ``overrides``, ``rounds``, ``json``.

    Returns
    -------
    int
        Exit code 0, or that of an error which all ranks met.

    Raises
    ------
    UsageError
        There are no rounds, or no ``dd``.
    """
    _limit_threads()
    from hpcpipe.bench.checkpoint import bench_checkpoint
    from hpcpipe.cli.bench_tables import print_checkpoint

    return _tell(bench_checkpoint(args.config, args.overrides, args.rounds), args.json, print_checkpoint)


def _limit_threads() -> None:
    """Keep BLAS to one thread, before numpy is imported."""
    from hpcpipe.cluster.environment import limit_blas_threads

    limit_blas_threads()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_compiling(name: str, index: int, total: int) -> None:
    _say(f"compiling kernels for this processor, once: {index}/{total} {name}")


def _tell(result: "BenchResult", as_json: bool, print_table: Callable[[dict[str, Any]], None]) -> int:
    """Print a report, on the rank that has one."""
    if result.report is not None and as_json:
        print(json.dumps(result.report, indent=1))
    elif result.report is not None:
        print_table(result.report)
    return int(result.code)
