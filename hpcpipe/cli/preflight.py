"""What is looked at before ranks are started: mistakes are told at once, and no process is started in vain."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcpipe.cli import train
from hpcpipe.cli.parser import Parser
from hpcpipe.config.schema import Config
from hpcpipe.errors import HpcpipeError


def check_start(arguments: Sequence[str], num_ranks: int) -> Path | None:
    """Check the arguments of ``train`` and its configuration for a number of ranks.

    Parameters
    ----------
    arguments : sequence of str
        CONFIG and options.
    num_ranks : int
        Ranks to start.

    Returns
    -------
    Path or None
        The run directory.

    Raises
    ------
    UsageError
        They are wrong; ``status.json`` says so where the run directory is known and no other run's.
    """
    from hpcpipe.config.check import resolve
    from hpcpipe.config.load import load, run_directory

    parsed = _parse(arguments)
    directory = run_directory(parsed.config, parsed.overrides)
    try:
        _check_layers(resolve(load(parsed.config, parsed.overrides), num_ranks))
    except HpcpipeError as error:
        from hpcpipe.train.last_status import write_last_status

        write_last_status(directory, error, is_first=True)
        raise
    return directory


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse as the ranks will."""
    parser = Parser(prog="hpcpipe")
    verbs: argparse._SubParsersAction[Any] = parser.add_subparsers()
    train.add_parser(verbs)
    return parser.parse_args(["train", *arguments])


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
