"""Running all ranks' lists against each other, with sends that block until their receive is posted."""

import numpy as np

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.clock import run, wait_for
from hpcpipe.schedule.positions import Positions, failure


def replay(schedule: Schedule, positions: Positions) -> None:
    """Run a schedule whose messages match, and refuse it if it cannot reach its end.

    A send waits until its receive is posted, which is how MPI treats messages above a size that nobody should rely
    on; a compute action waits for its message to be sent, or for the stage beside it on the same rank.

    Raises
    ------
    UsageError
        With the rank that waits, the position, and that nothing can go on.
    """
    flat = positions.flat
    index = positions.index
    enters = np.array([[schedule.input_crosses(stage)] for stage in range(schedule.num_stages)])
    leaves = np.array([[schedule.output_crosses(stage)] for stage in range(schedule.num_stages)])
    inputs = np.where(enters, *(np.roll(index(kind), 1, axis=0) for kind in (Kind.SEND_F, Kind.F)))
    computed = np.maximum(index(Kind.B), index(Kind.I))
    gradients = np.where(leaves, *(np.roll(table, -1, axis=0) for table in (index(Kind.SEND_B), computed)))
    needs = wait_for(flat, inputs, gradients)
    for send, receive, ahead in ((Kind.SEND_F, Kind.RECV_F, 1), (Kind.SEND_B, Kind.RECV_B, -1)):
        sends = flat.is_any(send)
        needs[sends] = index(receive)[flat.stage[sends] + ahead, flat.microbatch[sends]]

    nothing = [0.0] * len(needs)
    starts, _ = run(flat.offsets.tolist(), needs.tolist(), nothing, nothing)
    if None in starts:
        stuck = starts.index(None)
        rank = int(flat.rank[stuck])
        rule = "deadlock: no rank can go on from here"
        raise failure(schedule, rank, stuck - int(flat.offsets[rank]), rule)
