"""Cutting the list of layers into contiguous stages."""

from collections.abc import Sequence
from itertools import pairwise

from hpcpipe.model.layer import Layer


def partition(layers: Sequence[Layer], num_stages: int, blocks_per_stage: Sequence[int] | None = None) -> list[range]:
    """Cut embedding, blocks and head into stages: the embedding is on the first, the head on the last.

    Parameters
    ----------
    layers : sequence of Layer
        Embedding, at least ``num_stages - 1`` blocks, head.
    num_stages : int
        Stages, at least 1.
    blocks_per_stage : sequence of int, optional
        Blocks of each stage; the last may have none. Without it the layers' FLOPs decide, as in `balance_blocks`.

    Returns
    -------
    list of range
        Indices into `layers` of each stage.
    """
    if blocks_per_stage is None:
        blocks_per_stage = balance_blocks([float(layer.forward_flops(1)) for layer in layers], num_stages)
    ends = [1 + sum(blocks_per_stage[: stage + 1]) for stage in range(num_stages)]
    bounds = [0, *ends[:-1], len(layers)]
    return [range(start, end) for start, end in pairwise(bounds)]


def balance_blocks(costs: Sequence[float], num_stages: int) -> list[int]:
    """Return the blocks of each stage that make the slowest stage as fast as it can be.

    Parameters
    ----------
    costs : sequence of float
        Of the embedding, which stays with the first block, of at least ``num_stages - 1`` blocks, and of the head,
        which may be a stage of its own.
    num_stages : int
        Stages, at least 1.

    Returns
    -------
    list of int
        One count per stage; 0 on the last if the head is alone.
    """
    *counts, last = balance([costs[0] + costs[1], *costs[2:]], num_stages)
    return [*counts, last - 1]


def balance(costs: Sequence[float], num_stages: int) -> list[int]:
    """Cut a list of costs into contiguous parts, at least one item each, so that the largest sum is smallest.

    Exact, by dynamic programming over the position of the last cut. Among equals the more even cut wins (by the sum of
    squares), and then the one whose earlier parts are the longer ones: they wait longest for the first backward.

    Parameters
    ----------
    costs : sequence of float
        At least `num_stages` of them.
    num_stages : int
        Number of parts.

    Returns
    -------
    list of int
        Items per part.
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = [[(total[end], total[end] ** 2, 0) for end in range(len(total))]]
    for stage in range(1, num_stages):
        row = [(float("inf"), 0.0, 0)] * len(total)
        for end in range(stage + 1, len(total)):
            row[end] = min(
                (max(largest, total[end] - total[cut]), squares + (total[end] - total[cut]) ** 2, -cut)
                for cut in range(stage, end)
                for largest, squares, _ in [best[-1][cut]]
            )
        best.append(row)
    counts, end = [], len(costs)
    for row in reversed(best):
        cut = -row[end][2]
        counts.append(end - cut)
        end = cut
    return counts[::-1]
