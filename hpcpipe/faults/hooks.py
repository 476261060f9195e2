"""What the program calls where a fault may happen: nothing, unless ``HPCPIPE_FAULT`` is set."""

import os
from collections.abc import Iterable

import numpy as np

from hpcpipe.faults.inject import Injector
from hpcpipe.faults.parse import VARIABLE, parse

active: Injector | None = None
"""The faults of this process; None, which costs one look per call, where the variable is not set."""


def begin(process: int) -> None:
    """Read ``HPCPIPE_FAULT``.

    Parameters
    ----------
    process : int
        Number of this process in the first world communicator.

    Raises
    ------
    UsageError
        The variable names no such fault.
    """
    global active
    faults = parse(os.environ.get(VARIABLE, ""))
    active = Injector(faults, process) if faults else None


def take_rank(rank: int | None) -> None:
    """Note this process's place in the grid; None for a spare."""
    if active is not None:
        active.rank = rank


def enter_step(step: int) -> None:
    """Note that a step begins, counted from 1; see `point`."""
    if active is not None:
        active.step = step
        active.point("step")


def point(phase: str, microbatch: int | None = None) -> None:
    """Let faults of a phase happen, see `hpcpipe.faults.inject.Injector.point`."""
    if active is not None:
        active.point(phase, microbatch)


def corrupt(data: str, arrays: Iterable[np.ndarray], microbatch: int | None = None) -> None:
    """Let faults damage arrays in place, see `hpcpipe.faults.inject.Injector.corrupt`."""
    if active is not None:
        active.corrupt(data, arrays, microbatch)


def receive_tag(tag: int, microbatch: int | None = None) -> int:
    """Return the tag to post a receive with, see `hpcpipe.faults.inject.Injector.tag`."""
    return tag if active is None else active.tag(tag, microbatch)
