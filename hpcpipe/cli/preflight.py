"""What is looked at before ranks are started: mistakes are told at once, and no process is started in vain."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcpipe.cli import bench, train
from hpcpipe.cli.parser import Parser
from hpcpipe.config.schema import Config
from hpcpipe.errors import HpcpipeError, UsageError

_VERBS = {"train": train, "bench": bench}


def check_start(verb: str, arguments: Sequence[str], num_ranks: int) -> Path | None:
    """Check the arguments of a verb, and its configuration for a number of ranks.

    Parameters
    ----------
    verb : str
        ``train`` or ``bench``.
    arguments : sequence of str
        Of the verb.
    num_ranks : int
        Ranks to start.

    Returns
    -------
    Path or None
        The run directory; None for a verb that has none.

    Raises
    ------
    UsageError
        They are wrong; ``status.json`` says so where the run directory is known and no other run's.
    """
    parsed = _parse(verb, arguments)
    if verb == "bench":
        _check_bench(parsed, num_ranks)
        return None

    from hpcpipe.config.load import run_directory

    directory = run_directory(parsed.config, parsed.overrides)
    try:
        check_ranks(parsed, num_ranks)
    except HpcpipeError as error:
        from hpcpipe.train.last_status import write_last_status

        write_last_status(directory, error, is_first=True)
        raise
    return directory


def _parse(verb: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse as the ranks will."""
    parser = Parser(prog="hpcpipe")
    verbs: argparse._SubParsersAction[Any] = parser.add_subparsers()
    _VERBS[verb].add_parser(verbs)
    return parser.parse_args([verb, *arguments])


def _check_bench(parsed: argparse.Namespace, num_ranks: int) -> None:
    """Refuse a number of ranks that a benchmark is not for, and what `train` would refuse for one of steps."""
    if parsed.benchmark in bench.ALONE and num_ranks > 1:
        raise UsageError(
            f"launch -n {num_ranks} bench {parsed.benchmark}: it measures one process; run"
            f" `hpcpipe bench {parsed.benchmark}` by itself"
        )
    if parsed.benchmark in bench.TOGETHER and num_ranks < 2:
        raise UsageError(f"launch -n {num_ranks} bench {parsed.benchmark}: it needs at least 2 ranks")
    if parsed.benchmark in ("step", "checkpoint"):
        check_ranks(parsed, num_ranks)


def check_ranks(parsed: argparse.Namespace, num_ranks: int) -> None:
    """Load a configuration, which must be one for the number of ranks.

    Parameters
    ----------
    parsed : argparse.Namespace
        ``config`` and ``overrides``.
    num_ranks : int
        Ranks to start.

    Raises
    ------
    UsageError
        The configuration is wrong, or not one for so many ranks.
    """
    from hpcpipe.config.check import resolve
    from hpcpipe.config.load import load

    _check_layers(resolve(load(parsed.config, parsed.overrides), num_ranks))


def _check_layers(config: Config) -> None:
    """Refuse more stages than layers, so that a slip such as ``-n 10000`` starts nothing."""
    parallel = config.parallel
    if config.model.layers >= parallel.pipeline:
        return
    # The ranks check all schedules; numpy is imported here only where the number of stages is needed for the message.
    from hpcpipe.config.check import check_stages
    from hpcpipe.schedule.build import GENERATORS

    generator = GENERATORS.get(parallel.schedule)
    chunks = parallel.chunks or (generator.chunks if generator else 1) or 2
    check_stages(config, parallel.pipeline * chunks)
