"""Which cores each rank of a node computes on."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hpcpipe.cluster import slurm
from hpcpipe.cluster.processor import num_physical_cores

BIND = "HPCPIPE_BIND"
"""Variable that lets ranks take cores of their own: ``cores``."""

Processors = frozenset[int]
"""Numbers that Linux gives to hardware threads."""

_SHOWN = 8


@dataclass(frozen=True)
class Binding:
    """The ranks of one node and their cores.

    Attributes
    ----------
    ranks : tuple of int
        Their numbers in the run, ascending.
    cores : tuple of tuple of frozenset of int
        For each of them, the processors of each core that it may use.
    num_cores : int
        Cores that they may use together, see `count_cores`.
    num_threads : int
        Threads of each rank.
    """

    ranks: tuple[int, ...]
    cores: tuple[tuple[Processors, ...], ...]
    num_cores: int
    num_threads: int

    @property
    def are_apart(self) -> bool:
        """Whether no two ranks have a processor in common."""
        used = [core for cores in self.cores for core in cores]
        return len(set().union(*used)) == sum(map(len, used))

    @property
    def is_oversubscribed(self) -> bool:
        """Whether there are more threads than cores, on the node or in a rank."""
        fewest = min(map(len, self.cores))
        return len(self.ranks) * self.num_threads > self.num_cores or self.num_threads > fewest

    def processors(self, index: int) -> Processors:
        """Return where a rank runs; `index` counts the ranks of the node."""
        return frozenset().union(*self.cores[index])

    def own_cores(self, index: int) -> tuple[Processors, ...]:
        """Return all cores of a rank if they are its own and enough for its threads, else none."""
        return self.cores[index] if self.are_apart and not self.is_oversubscribed else ()

    def describe(self) -> str:
        """Say in one line what runs where."""
        threads = f"{self.num_threads} thread{'' if self.num_threads == 1 else 's'}"
        crowd = ": more threads than cores" if self.is_oversubscribed else ""
        if len(self.ranks) == 1:
            return f"{threads} on {_span(self.processors(0))}{crowd}"
        each = f"{len(self.ranks)} ranks with {threads} each"
        if len(set(self.cores)) == 1:
            return f"{each} share {_span(self.processors(0))}{crowd or ', not bound'}"
        shown = [f"rank {rank} on {_span(self.processors(index))}" for index, rank in enumerate(self.ranks[:_SHOWN])]
        more = len(self.ranks) - len(shown)
        return f"{each}: {', '.join(shown)}{f' and {more} more' if more else ''}{crowd}"


def bind(
    ranks: Sequence[int],
    masks: Sequence[Processors],
    num_threads: int,
    environ: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
) -> Binding:
    """Decide where the ranks of a node compute.

    Where `BIND` asks for it, ranks that may all use the same cores get some of their own, if those are enough for all
    threads. Ranks that the launcher has bound keep theirs. So does a rank that has its node for itself: nobody is in
    its way, and two such runs would be bound to the same cores. Nothing is bound where ranks see cores that are not
    meant for them.

    Parameters
    ----------
    ranks : sequence of int
        The ranks of the node.
    masks : sequence of frozenset of int
        The processors that each may use.
    num_threads : int
        Threads of each rank.
    environ : mapping
        The process's environment.
    root : Path
        Where ``/sys`` and ``/proc`` are found; another one only in tests.

    Returns
    -------
    Binding
        Every rank of the node computes the same.
    """
    everything = frozenset().union(*masks)
    domains = find_cores(everything, root)
    num_cores = count_cores(everything, environ, root)
    sees_others = num_cores < sum(map(len, domains))
    own: list[tuple[Processors, ...]] = []
    if environ.get(BIND) == "cores" and len(ranks) > 1 and len(set(masks)) == 1 and not sees_others:
        own = deal(domains, len(ranks), num_threads)
    kept = [tuple(core & mask for domain in domains for core in domain if core & mask) for mask in masks]
    return Binding(tuple(ranks), tuple(own or kept), num_cores, num_threads)


def count_cores(processors: Collection[int], environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Count the cores that ranks on these processors may use.

    Parameters
    ----------
    processors : collection of int
        What the ranks of a node see.
    environ, root
        As in `bind`.

    Returns
    -------
    int
        No more than a CPU quota allows, and than Slurm grants, which does not confine jobs to that everywhere.
    """
    allocation = slurm.allocation(environ)
    granted = allocation.num_cpus_per_node if allocation else None
    return min(num_physical_cores(root, processors), granted or len(processors))


def find_cores(processors: Collection[int], root: Path = Path("/")) -> list[list[Processors]]:
    """Group processors into cores, and cores into NUMA domains.

    Parameters
    ----------
    processors : collection of int
        The processors.
    root : Path
        As in `bind`.

    Returns
    -------
    list of list of frozenset of int
        Domains that have some of them, each with its cores in ascending order.
    """
    left = frozenset(processors)
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    domains = []
    for listed in (_read_list(node / "cpulist") for node in nodes):
        domains.append(_cores_of(listed & left, root))
        left -= listed
    return [domain for domain in (*domains, _cores_of(left, root)) if domain]


def deal(domains: Sequence[Sequence[Processors]], num_ranks: int, num_threads: int) -> list[tuple[Processors, ...]]:
    """Give each rank as many cores as it has threads, neighbours in the pipeline near each other.

    Ranks are spread evenly over the domains, and each lies within one, if that is possible. Otherwise they are spread
    over all cores in order.

    Parameters
    ----------
    domains : sequence of sequence of frozenset of int
        From `find_cores`.
    num_ranks, num_threads : int
        Ranks, and threads of each.

    Returns
    -------
    list of tuple of frozenset of int
        The cores of each rank; empty if there are not enough.
    """
    starts = [-(-domain * num_ranks // len(domains)) for domain in range(len(domains) + 1)]
    counts = [stop - start for start, stop in pairwise(starts)]
    if any(len(cores) < count * num_threads for cores, count in zip(domains, counts, strict=True)):
        domains, counts = [[core for domain in domains for core in domain]], [num_ranks]
    dealt = []
    for cores, count in zip(domains, counts, strict=True):
        if len(cores) < count * num_threads:
            return []
        for place in range(count):
            start = place * len(cores) // count
            dealt.append(tuple(cores[start : start + num_threads]))
    return dealt


def _cores_of(processors: Processors, root: Path) -> list[Processors]:
    """Group the processors of a domain by core."""
    cores = []
    left = processors
    while left:
        first = min(left)
        siblings = _read_list(root / f"sys/devices/system/cpu/cpu{first}/topology/thread_siblings_list") | {first}
        cores.append(siblings & left)
        left -= siblings
    return cores


def _read_list(path: Path) -> Processors:
    """Read a list such as ``0-3,8``; empty where there is none."""
    try:
        parts = path.read_text().strip().split(",")
        spans = [[int(end) for end in part.split("-")] for part in parts if part]
    except (OSError, ValueError):
        return frozenset()
    return frozenset(number for span in spans for number in range(span[0], span[-1] + 1))


def _span(processors: Processors) -> str:
    """Write numbers as Linux does, ``0-3,8``."""
    numbers = sorted(processors)
    starts = [number for number in numbers if number - 1 not in processors]
    ends = [number for number in numbers if number + 1 not in processors]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
