"""How many buffers of each kind a rank needs to walk its list."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.flat import flatten


@dataclass(frozen=True)
class BufferCounts:
    """Peak number of live buffers of one rank.

    Attributes
    ----------
    streams : int
        Inputs, outputs and gradients of stages, which all have one shape: posted, in use, or on their way out.
    stashes : int
        Stashes of activations, from the forward to the end of the backward.
    upstreams : int
        What I leaves for W, where the two are apart.
    """

    streams: int
    stashes: int
    upstreams: int


_IN_FLIGHT = 2


def count_buffers(schedule: Schedule, rank: int) -> BufferCounts:
    """Walk the list of a rank and count what is alive at the same time.

    An output counts until the gradient that answers it arrives, and two more streams are added for messages on their
    way out, so that a send does not hold up compute.

    Parameters
    ----------
    schedule : Schedule
        A lowered schedule.
    rank : int
        The pipeline rank.
    """
    live = {"streams": 0, "stashes": 0, "upstreams": 0}
    peak = dict(live)

    def change(name: str, amount: int) -> None:
        live[name] += amount
        peak[name] = max(peak[name], live[name])

    forward_only = schedule.is_forward_only
    for action in schedule.actions[rank]:
        kind, stage = action.kind, action.stage
        is_last = stage + 1 == schedule.num_stages
        if kind in (Kind.RECV_F, Kind.RECV_B):
            change("streams", +1)
        elif kind is Kind.F:
            change("stashes", +1)
            change("streams", 0 if is_last else +1)
            if forward_only:
                change("stashes", -1)
                change("streams", -(stage > 0) - schedule.output_crosses(stage))
        elif kind in (Kind.B, Kind.I):
            change("streams", +is_last)
            change("streams", -schedule.output_crosses(stage))
            change("streams", -(stage == 0 or schedule.input_crosses(stage)))
        if kind is Kind.I:
            change("upstreams", +1)
        elif kind is Kind.W:
            change("upstreams", -1)
        if kind in (Kind.B, Kind.W):
            change("stashes", -1)
            change("streams", -(stage > 0))
    return BufferCounts(peak["streams"] + _IN_FLIGHT, peak["stashes"], peak["upstreams"])


def peak_stash(schedule: Schedule) -> list[float]:
    """Return each rank's peak stash in activations of one microbatch through all layers of that rank."""
    flat = flatten(schedule.actions)
    change = flat.is_any(Kind.F) * 1
    if not schedule.is_forward_only:
        change -= flat.is_any(Kind.B, Kind.W)
    peaks = [
        1 if schedule.is_forward_only and stop > start else int(np.cumsum(change[start:stop]).max(initial=0))
        for start, stop in pairwise(flat.offsets.tolist())
    ]
    return [peak / max(1, len(schedule.stages_of(rank))) for rank, peak in enumerate(peaks)]
