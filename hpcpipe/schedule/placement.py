"""Which rank holds which stage: the three placements of the field."""

Placement = tuple[int, ...]


def looped(num_ranks: int, num_chunks: int) -> Placement:
    """Return stage ``s`` on rank ``s mod p``; with one chunk, one stage after the other."""
    return tuple(stage % num_ranks for stage in range(num_ranks * num_chunks))


def v_shaped(num_ranks: int) -> Placement:
    """Return two stages per rank, down and up again: the first and the last stage are on rank 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))
