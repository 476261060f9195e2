"""How many buffers of each kind a rank needs to walk its list."""

from dataclasses import dataclass

from hpcpipe.schedule.action import Kind, Schedule


@dataclass(frozen=True)
class BufferCounts:
    """Peak number of live buffers of one rank.

    Attributes
    ----------
    inputs : int
        Stage inputs, from the posting of the receive (or the forward) to the end of the backward.
    stashes : int
        Stashes of activations, from the forward to the end of the backward.
    outputs : int
        Stage outputs being sent.
    gradients : int
        Gradients of stage outputs, turned into gradients of stage inputs in place and sent on.
    weight_inputs : int
        What I leaves for W, where the two are apart.
    """

    inputs: int
    stashes: int
    outputs: int
    gradients: int
    weight_inputs: int


def count_buffers(schedule: Schedule, rank: int) -> BufferCounts:
    """Walk the list of a rank and count what is alive at the same time.

    Parameters
    ----------
    schedule : Schedule
        A lowered schedule.
    rank : int
        The pipeline rank.
    """
    live = dict.fromkeys(("inputs", "stashes", "gradients", "weight_inputs"), 0)
    peak = dict(live)

    def change(name: str, amount: int) -> None:
        live[name] += amount
        peak[name] = max(peak[name], live[name])

    forward_only = schedule.is_forward_only
    for action in schedule.actions[rank]:
        kind, stage = action.kind, action.stage
        if kind is Kind.RECV_F or (kind is Kind.F and not schedule.input_crosses(stage)):
            change("inputs", +1)
        if kind is Kind.F:
            change("stashes", +1)
        if kind is Kind.RECV_B or (kind in (Kind.B, Kind.I) and not schedule.output_crosses(stage)):
            change("gradients", +1)
        if kind is Kind.I:
            change("weight_inputs", +1)
        if kind in (Kind.B, Kind.I):
            change("gradients", -1)
        if kind in (Kind.B, Kind.W) or (kind is Kind.F and forward_only):
            change("stashes", -1)
            change("inputs", -1)
        if kind is Kind.W:
            change("weight_inputs", -1)
    # A buffer on its way out stays taken until its message has left: one more of each kind that is sent, and as many
    # outputs as there are microbatches between a forward and its backward, keeps sends from ever holding up compute.
    return BufferCounts(
        inputs=peak["inputs"],
        stashes=peak["stashes"],
        outputs=max(2, peak["stashes"]),
        gradients=peak["gradients"] + 1,
        weight_inputs=peak["weight_inputs"],
    )


def peak_stash(schedule: Schedule) -> list[float]:
    """Return each rank's peak stash in activations of one microbatch through all layers of that rank."""
    stages_per_rank = [len(schedule.stages_of(rank)) for rank in range(schedule.num_ranks)]
    return [
        count_buffers(schedule, rank).stashes / max(1, stages_per_rank[rank])
        for rank in range(schedule.num_ranks)
    ]
