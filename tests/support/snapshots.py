"""The memory that a rank's checkpoints are copied into, made as a run makes it."""

import numpy as np

from hpcpipe.checkpoint.snapshot import snapshot_bytes
from hpcpipe.memory.shared import SharedBlock
from hpcpipe.train.save import SNAPSHOT, piece_specs
from hpcpipe.train.state import State


def allocate_snapshot(state: State) -> np.ndarray:
    """Return the block of a rank's snapshot; it is counted as long as it is held."""
    shared = SharedBlock(SNAPSHOT)
    try:
        return shared.allocate(snapshot_bytes(spec.num_bytes for spec in piece_specs(state)))
    finally:
        shared.close()
