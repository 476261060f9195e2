"""What the steps before a start came to, as far as later steps are judged by it: the same on every rank."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpcpipe.mpi.collectives import broadcast_bytes
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.spikes import WINDOW

REWOUND = "going back"
"""The event of a run that goes back to an earlier step."""


@dataclass(frozen=True)
class History:
    """The last steps, and from where the run went back.

    Attributes
    ----------
    steps : tuple of (float, float)
        Loss and gradient norm of the last steps in which they were finite.
    num_skipped : int
        Steps that were skipped because they were not, directly before the next one.
    rewound : tuple of int
        Steps at which this start of the run went back.
    """

    steps: tuple[tuple[float, float], ...] = ()
    num_skipped: int = 0
    rewound: tuple[int, ...] = ()


NO_HISTORY = History()


def history_from(rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], step: int) -> History:
    """Return what matters of the metrics and events of a run.

    Parameters
    ----------
    rows : sequence of mapping
        Of ``metrics.jsonl``; those of later steps and of evaluations are passed over.
    events : sequence of mapping
        Of ``events.jsonl``.
    step : int
        The last step that is done.
    """
    steps: list[tuple[float, float]] = []
    num_skipped = 0
    for row in rows:
        if "loss" not in row or row["step"] > step:
            continue
        if row["loss"] is None or row["grad_norm"] is None:
            num_skipped += 1
        else:
            num_skipped = 0
            steps.append((float(row["loss"]), float(row["grad_norm"])))
    rewound: list[int] = []
    for event in events:
        if event.get("event") == "started":
            rewound = []
        elif event.get("event") == REWOUND:
            rewound.append(int(event["step"]))
    # Whether a step was a spike depends on those of the window before it.
    return History(tuple(steps[-2 * WINDOW :]), num_skipped, tuple(rewound))


def share_history(grid: Grid, waiter: Waiter, history: History) -> History:
    """Give every rank what rank 0 knows; all ranks call it.

    Raises
    ------
    RankError
        If rank 0 does not answer in time.
    """
    content = json.dumps(asdict(history)).encode() if grid.comm.rank == 0 else None
    found = json.loads(broadcast_bytes(grid.comm, waiter, content, 0))
    steps = tuple((loss, norm) for loss, norm in found["steps"])
    return History(steps, found["num_skipped"], tuple(found["rewound"]))
