"""How many threads a rank gets."""

from dataclasses import dataclass

from hpcpipe.errors import UsageError

_MOST_BEYOND_CORES = 64


@dataclass(frozen=True)
class Node:
    """A node: ranks of the run, and cores that they may use."""

    num_ranks: int
    num_cores: int


def choose_threads(threads: int, node: Node | None) -> int:
    """Return the threads of each rank.

    More threads than cores are slow and no error, so that what needs many can be tried on few.

    Parameters
    ----------
    threads : int
        ``parallel.threads``; 0 leaves the choice to this function.
    node : Node or None
        The node with the fewest cores for each of its ranks; None where it is not known yet.

    Returns
    -------
    int
        The asked number, or the node's cores / its ranks; at least 1.

    Raises
    ------
    UsageError
        There are far more threads than cores.
    """
    if threads == 0:
        return max(1, node.num_cores // node.num_ranks) if node else 1
    if node and threads > _MOST_BEYOND_CORES and threads * node.num_ranks > node.num_cores:
        fitting = max(1, node.num_cores // node.num_ranks)
        raise UsageError(
            f"parallel.threads = {threads} x {node.num_ranks} ranks of a node is more than its {node.num_cores} cores,"
            f" and no rank may have more than {_MOST_BEYOND_CORES} threads then: set parallel.threads = {fitting}, or 0"
            " to have it chosen"
        )
    return threads
