"""What every program on ranks does before it trains: agree on a configuration, compile, see that it fits."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcpipe.cluster.binding import Binding
from hpcpipe.cluster.processor import memory
from hpcpipe.config.check import resolve
from hpcpipe.config.load import load
from hpcpipe.config.schema import Config
from hpcpipe.faults import hooks
from hpcpipe.kernels import warm
from hpcpipe.kernels.features import FAMILIES, family
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.collectives import barrier, gather_rows
from hpcpipe.mpi.runtime import World
from hpcpipe.mpi.wait import Waiter
from hpcpipe.schedule.action import Schedule
from hpcpipe.train.footprint import predict_memory, require_memory
from hpcpipe.train.session import Session, build_schedule, check_schedule
from hpcpipe.train.stop import StopRequest

MESSAGES = "HPCPIPE_TEST_MESSAGES"

SETUP_TIMEOUT_S = 3600.0
"""Compiling, preparing data and compressing held-out text take as long as they take, on one rank."""


@dataclass(frozen=True)
class Setup:
    """What all ranks agree on.

    Attributes
    ----------
    config : Config
        Resolved.
    schedule : Schedule
        What the ranks of each pipeline do in a step, as far as the configuration says.
    mode : MessageMode
        How messages are sent.
    binding : Binding
        Which cores the ranks of this node compute on: this rank does so from now on.
    waiter : Waiter
        Waits, for now with a deadline that compiling does not reach.
    families : tuple of str
        Kernel families that ranks would multiply bfloat16 with, the fastest first.
    """

    config: Config
    schedule: Schedule
    mode: MessageMode
    binding: Binding
    waiter: Waiter
    families: tuple[str, ...]


def agree_on_setup(world: World, config_path: Path, overrides: Sequence[str]) -> Setup:
    """Load and check a configuration for all ranks, and bind this one.

    Parameters
    ----------
    world : World
        All ranks call it.
    config_path : Path
        The TOML file.
    overrides : sequence of str
        ``section.key=value`` each.

    Raises
    ------
    UsageError
        On every rank, if the configuration is wrong on one of them.
    """
    waiter = Waiter(SETUP_TIMEOUT_S, owns_core=world.owns_core)
    with together(world.comm, waiter):
        hooks.begin(world.rank)
        own = FAMILIES.index(family())
    families = tuple(FAMILIES[i] for i in sorted(set(gather_rows(world.comm, waiter, np.array([own])).flat)))
    has_unit = "vector" not in families
    with together(world.comm, waiter):
        config = resolve(load(config_path, overrides), world.num_ranks, has_unit, world.tightest)
        schedule = build_schedule(config)
        config = check_schedule(config, schedule)
        mode = MessageMode.parse(os.environ.get(MESSAGES, ""))
        binding = world.bind(config.parallel.threads)
    waiter.owns_core = not binding.is_oversubscribed
    hooks.point("setup")
    return Setup(config, schedule, mode, binding, waiter, families)


class _AskedError(Exception):
    """Ends the compilation of kernels."""


def compile_kernels(
    session: Session, world: World, say: Callable[[str], None] | None = None, stop: StopRequest | None = None
) -> None:
    """Compile the kernels on one rank per node; the others load them from its cache.

    Parameters
    ----------
    session : Session
        The run.
    world : World
        All ranks call it.
    say : callable, optional
        Takes a line about each kernel that must be compiled; the session's console without it.
    stop : StopRequest, optional
        Looked at before each kernel that must be compiled.

    Raises
    ------
    StoppedError
        On every rank, if one of them was asked to stop.
    """
    tell = say or session.console.say

    def report(name: str, index: int, total: int) -> None:
        if stop is not None and stop.is_set:
            raise _AskedError
        tell(f"compiling kernels for this processor, once: {index}/{total} {name}")

    precision = session.config.train.precision
    if world.local_rank == 0:
        with suppress(_AskedError):
            warm.compile_all(None if warm.is_compiled(precision) else report, precision)
            session.team.prepare()
    if stop is None:
        barrier(world.comm, session.waiter)
    else:
        leave_if_asked(session, stop)
    if world.local_rank != 0:
        warm.compile_all(None, precision)
        session.team.prepare()


def leave_if_asked(session: Session, stop: StopRequest, step: int = 0) -> None:
    """Leave together before the first step if a rank was asked to stop; all ranks call it.

    Parameters
    ----------
    session : Session
        The run.
    stop : StopRequest
        Of this rank.
    step : int
        The last step that is done, as far as that is known.

    Raises
    ------
    StoppedError
        On every rank.
    """
    stop.look(step)
    if gather_rows(session.grid.comm, session.waiter, np.array([stop.is_set])).any():
        stop.conclude()
        advice = "; run the same command again"
        error = stop.error("before the first step", advice)
        cause = str(error).removesuffix(advice)
        session.events.add("stopped", step=step, exit_code=int(error.exit_code), cause=cause, by=error.by)
        raise error


def require_own_memory(session: Session, config: Config) -> dict[str, int]:
    """Refuse a run that does not fit, and return the bytes that this rank needs, by what they are for."""
    grid = session.grid
    is_spread = grid.comm.size > session.num_local_ranks
    needed = predict_memory(config, session.schedule, grid.stage_rank, grid.replica, on_several_nodes=is_spread)
    require_memory(sum(needed.values()), session.num_local_ranks, memory().available_bytes)
    return needed
