"""From the name of a schedule to a proven program of actions and messages."""

from collections.abc import Callable

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.check import check
from hpcpipe.schedule.forward import forward
from hpcpipe.schedule.gpipe import gpipe
from hpcpipe.schedule.lower import lower
from hpcpipe.schedule.one_forward_one_backward import one_forward_one_backward

GENERATORS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "forward": forward,
}


def build(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """Generate a schedule, add its messages and prove it.

    Parameters
    ----------
    name : str
        A key of `GENERATORS`.
    num_ranks, num_microbatches : int
        Pipeline ranks and microbatches per step.

    Returns
    -------
    Schedule
        The lowered schedule, ready to be executed.

    Raises
    ------
    UsageError
        If there is no such schedule, or it breaks a rule of `check`.
    """
    if name not in GENERATORS:
        raise UsageError(f"there is no schedule '{name}': choose one of {', '.join(GENERATORS)}")
    if num_ranks < 1 or num_microbatches < 1:
        raise UsageError(f"a schedule needs at least 1 rank and 1 microbatch, not {num_ranks} and {num_microbatches}")
    program = lower(GENERATORS[name](num_ranks, num_microbatches))
    check(program)
    return program
