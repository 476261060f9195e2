"""The memory that a rank's state is copied into, for checkpoints and for other ranks, made as a run makes it."""

import numpy as np

from hpcpipe.checkpoint.snapshot import snapshot_bytes
from hpcpipe.config.schema import Config
from hpcpipe.memory.shared import SharedBlock
from hpcpipe.recovery.copies import Copies
from hpcpipe.train.parts import parts_of
from hpcpipe.train.save import SNAPSHOT, piece_specs
from hpcpipe.train.state import State


def allocate_snapshot(state: State) -> np.ndarray:
    """Return the block of a rank's snapshot; it is counted as long as it is held."""
    shared = SharedBlock(SNAPSHOT)
    try:
        return shared.allocate(snapshot_bytes(spec.num_bytes for spec in piece_specs(state)))
    finally:
        shared.close()


def allocate_copies(config: Config, state: State) -> Copies | None:
    """Make what a rank keeps of its own and its neighbour's state; None for a rank that is alone."""
    degrees = config.parallel.pipeline, config.parallel.data
    if degrees == (1, 1):
        return None
    return Copies(parts_of(state), 1)
