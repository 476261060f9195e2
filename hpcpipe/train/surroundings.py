"""What a run gives its guard: the steps before, the record of events, and a voice."""

from typing import Any

from hpcpipe.mpi.agree import together
from hpcpipe.train.guard import Surroundings
from hpcpipe.train.history import NO_HISTORY, history_from, share_history
from hpcpipe.train.session import Session


def surroundings_of(session: Session, step: int, *, recovers: bool) -> Surroundings:
    """Return what the guard of a trainer needs; all ranks call it.

    Parameters
    ----------
    session : Session
        The run, whose metrics end with the last finished step.
    step : int
        That step.
    recovers : bool
        Whether an `hpcpipe.errors.Interruption` lets the run go on from an earlier state.

    Raises
    ------
    DiskError
        On all ranks, if rank 0 cannot read the run's files.
    """
    history = NO_HISTORY
    with together(session.grid.comm, session.waiter):
        if session.metrics is not None:
            history = history_from(session.metrics.read(), session.events.read(), step)

    def tell(event: str, **facts: Any) -> None:
        session.events.add(event, **facts)
        details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if name != "step")
        session.console.say(f"warning: step {facts['step']}: {event}: {details}")

    return Surroundings(share_history(session.grid, session.waiter, history), tell, recovers)
