"""Cutting the list of layers into contiguous stages."""

from collections.abc import Sequence

from hpcpipe.model.layer import Layer


def partition(layers: Sequence[Layer], num_stages: int, blocks_per_stage: Sequence[int] | None = None) -> list[range]:
    """Cut embedding, blocks and head into stages; the ends go with the first and the last block.

    Parameters
    ----------
    layers : sequence of Layer
        Embedding, at least `num_stages` blocks, head.
    num_stages : int
        Stages, at least 1.
    blocks_per_stage : sequence of int, optional
        Blocks of each stage; without it the slowest stage is made as fast as it can be, by the layers' FLOPs.

    Returns
    -------
    list of range
        Indices into `layers` of each stage.
    """
    num_blocks = len(layers) - 2
    if blocks_per_stage is None:
        costs = [float(layer.forward_flops(1)) for layer in layers[1:-1]]
        costs[0] += layers[0].forward_flops(1)
        costs[-1] += layers[-1].forward_flops(1)
        blocks_per_stage = balance(costs, num_stages)
    ends = [sum(blocks_per_stage[: stage + 1]) for stage in range(num_stages)]
    starts = [0, *ends[:-1]]
    return [range(start + (start > 0), end + 1 + (end == num_blocks)) for start, end in zip(starts, ends, strict=True)]


def balance(costs: Sequence[float], num_stages: int) -> list[int]:
    """Cut a list of costs into contiguous parts, at least one item each, so that the largest sum is smallest.

    Exact, by dynamic programming over the position of the last cut. Among equals the earlier stages are the longer
    ones: they wait longest for the first backward.

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
    best: list[list[tuple[float, int]]] = [[(total[end], 0) for end in range(len(total))]]
    for stage in range(1, num_stages):
        row = [(float("inf"), 0)] * len(total)
        for end in range(stage + 1, len(total)):
            row[end] = min((max(best[-1][cut][0], total[end] - total[cut]), -cut) for cut in range(stage, end))
        best.append(row)
    counts, end = [], len(costs)
    for row in reversed(best):
        cut = -row[end][1]
        counts.append(end - cut)
        end = cut
    return counts[::-1]
