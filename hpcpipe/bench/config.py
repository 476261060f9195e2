"""Configurations and tokens for benchmarks, which need no grid and no data that has been prepared."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hpcpipe.config.check import resolve
from hpcpipe.config.load import load
from hpcpipe.config.schema import Config
from hpcpipe.data.reader import TokenFile
from hpcpipe.data.tokenizer import ByteTokenizer
from hpcpipe.kernels.threads import Team
from hpcpipe.mpi.grid import make_grid
from hpcpipe.mpi.runtime import World
from hpcpipe.telemetry.console import Console
from hpcpipe.telemetry.events import EventLog
from hpcpipe.train.directory import RunDirectory
from hpcpipe.train.session import Session
from hpcpipe.train.setup import Setup


def load_for_any_grid(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Load and check a configuration for as many ranks as it asks for.

    Parameters
    ----------
    path : Path
        The TOML file.
    overrides : sequence of str
        ``section.key=value`` each.

    Raises
    ------
    UsageError
        It is wrong.
    """
    config = load(path, overrides)
    return resolve(config, max(1, config.parallel.pipeline) * config.parallel.data)


def with_vocabulary(config: Config) -> Config:
    """Fill in the vocabulary from the token file, or from the tokenizer that would prepare one; nothing is written.

    Raises
    ------
    UsageError, DamagedError
        The token file is missing or cannot be read.
    """
    if config.model.vocab:
        return config
    vocab = TokenFile(Path(config.data.file)).vocab if config.data.file else ByteTokenizer().vocab
    return replace(config, model=replace(config.model, vocab=vocab))


def quiet_session(world: World, setup: Setup, team: Team, directory: RunDirectory) -> Session:
    """Return a session that says nothing and keeps no events.

    Parameters
    ----------
    world : World
        All ranks call it.
    setup : Setup
        What they have agreed on.
    team : Team
        This rank's threads.
    directory : RunDirectory
        Where it would keep files.
    """
    parallel = setup.config.parallel
    return Session(
        setup.config,
        setup.schedule,
        directory,
        make_grid(world.comm, parallel.pipeline, parallel.data),
        world.num_local_ranks,
        world.num_local_cores,
        setup.binding,
        team,
        setup.waiter,
        setup.mode,
        Console("quiet"),
        EventLog(None),
    )


class RandomSamples:
    """Samples of random tokens, a function of their number.

    Parameters
    ----------
    vocab : int
        Number of token ids.
    """

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab

    def batch(self, first: int, count: int, tokens: np.ndarray, targets: np.ndarray, /) -> None:
        """Write samples into the caller's arrays, int32 of shape (count, context)."""
        for row in range(count):
            stream = np.random.default_rng(first + row).integers(0, self._vocab, tokens.shape[1] + 1, np.int32)
            tokens[row], targets[row] = stream[:-1], stream[1:]
