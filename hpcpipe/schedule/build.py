"""From the name of a schedule to a proven program of actions and messages."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.check import check
from hpcpipe.schedule.controllable_memory import v_half, v_min
from hpcpipe.schedule.dualpipe_v import dualpipe_v
from hpcpipe.schedule.forward import forward
from hpcpipe.schedule.gpipe import gpipe, looped_bfs
from hpcpipe.schedule.greedy import greedy
from hpcpipe.schedule.interleaved import interleaved, interleaved_zero_bubble
from hpcpipe.schedule.lower import lower
from hpcpipe.schedule.one_forward_one_backward import eager_one_forward_one_backward, one_forward_one_backward
from hpcpipe.schedule.placement import Placement, looped, v_shaped
from hpcpipe.schedule.simulate import Costs
from hpcpipe.schedule.zb_v import zb_v
from hpcpipe.schedule.zero_bubble import zb_h1, zb_h2


@dataclass(frozen=True)
class Generator:
    """A way to make a schedule.

    Attributes
    ----------
    make : callable
        Takes ranks, microbatches and chunks.
    chunks : int
        Stages per rank that the schedule is defined for; 0 if any number.
    """

    make: Callable[[int, int, int], Schedule]
    chunks: int


def _fixed(make: Callable[[int, int], Schedule], chunks: int) -> Generator:
    return Generator(lambda num_ranks, num_microbatches, _: make(num_ranks, num_microbatches), chunks)


def _greedy_placement(num_ranks: int, num_chunks: int) -> Placement:
    return v_shaped(num_ranks) if num_chunks == 2 else looped(num_ranks, num_chunks)


def _greedy(
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    costs: Costs | None = None,
    max_stash: Sequence[float] | None = None,
) -> Schedule:
    placement = _greedy_placement(num_ranks, num_chunks)
    costs = costs or Costs.even(num_ranks, len(placement))
    return greedy(placement, num_microbatches, costs, max_stash)


GENERATORS: dict[str, Generator] = {
    "gpipe": _fixed(gpipe, 1),
    "looped-bfs": Generator(looped_bfs, 0),
    "1f1b": _fixed(one_forward_one_backward, 1),
    "eager-1f1b": _fixed(eager_one_forward_one_backward, 1),
    "interleaved": Generator(interleaved, 0),
    "interleaved-zb": Generator(interleaved_zero_bubble, 0),
    "zb-h1": _fixed(zb_h1, 1),
    "zb-h2": _fixed(zb_h2, 1),
    "zb-v": _fixed(zb_v, 2),
    "v-half": _fixed(v_half, 2),
    "v-min": _fixed(v_min, 2),
    "dualpipe-v": _fixed(dualpipe_v, 2),
    "greedy": Generator(_greedy, 0),
    "forward": Generator(lambda num_ranks, m, num_chunks: forward(looped(num_ranks, num_chunks), m), 1),
}


def generate(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int = 0,
    costs: Costs | None = None,
    max_stash: Sequence[float] | None = None,
) -> Schedule:
    """Generate a schedule of compute actions.

    Parameters
    ----------
    name : str
        A key of `GENERATORS`.
    num_ranks, num_microbatches : int
        Pipeline ranks, and microbatches per step.
    num_chunks : int
        Stages per rank; 0 for what the schedule is defined for, or two where it may be any number.
    costs, max_stash
        What `greedy` plans with, as it takes them; other schedules depend on neither. `build` holds them all to
        ``max_stash``.

    Raises
    ------
    UsageError
        If there is no such schedule, or it is not defined for these numbers.
    """
    if name not in GENERATORS:
        raise UsageError(f"there is no schedule '{name}': choose one of {', '.join(GENERATORS)}")
    if num_ranks < 1 or num_microbatches < 1 or num_chunks < 0:
        raise UsageError(
            f"a schedule needs at least 1 rank and 1 microbatch, not {num_ranks} and {num_microbatches}, and no"
            f" negative number of chunks, not {num_chunks}"
        )
    generator = GENERATORS[name]
    if generator.chunks and num_chunks not in (0, generator.chunks):
        raise UsageError(
            f"the schedule {name} has {generator.chunks} stage{'s' * (generator.chunks > 1)} per rank, not"
            f" {num_chunks}: set parallel.chunks = {generator.chunks}, or another parallel.schedule"
        )
    num_chunks = num_chunks or generator.chunks or 2
    if generator.make is _greedy:
        return _greedy(num_ranks, num_microbatches, num_chunks, costs, max_stash)
    return generator.make(num_ranks, num_microbatches, num_chunks)


def build(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int = 0,
    costs: Costs | None = None,
    max_stash: Sequence[float] | None = None,
) -> Schedule:
    """Generate a schedule, add its messages and prove it; parameters and errors as in `generate`.

    Returns
    -------
    Schedule
        The lowered schedule, ready to be executed.
    """
    with _without_collection():
        program = lower(generate(name, num_ranks, num_microbatches, num_chunks, costs, max_stash))
        check(program, max_stash)
    return program


def build_forward(placement: Sequence[int], num_microbatches: int) -> Schedule:
    """Generate, lower and prove the forward-only schedule of a placement.

    Parameters
    ----------
    placement : sequence of int
        The rank of each stage, as in the training schedule.
    num_microbatches : int
        Microbatches that flow through, at least 1.
    """
    program = lower(forward(placement, num_microbatches))
    check(program)
    return program


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from walking over half a million actions again and again: none is garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
