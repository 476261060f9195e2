"""The story of a failure, from the flight recorders of all ranks: what each did last, and who waited for whom."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcpipe.watch.flight import Flight, merge, rings
from hpcpipe.watch.graph import describe_deadlock, describe_rank
from hpcpipe.watch.layout import OVER, Phase, Record
from hpcpipe.watch.verdict import Rank, name_action


@dataclass(frozen=True)
class Entry:
    """One thing that a process did.

    Attributes
    ----------
    before_s : float
        How long before the recorders were kept it was over.
    process : int
        Process number.
    text : str
        What it was.
    seconds : float
        How long it took.
    step, epoch : int
        The step, and how many recoveries there were.
    """

    before_s: float
    process: int
    text: str
    seconds: float
    step: int
    epoch: int


@dataclass(frozen=True)
class Story:
    """What flight recorders tell.

    Attributes
    ----------
    cause : mapping
        Why they were kept.
    processes : dict of int to str
        What each process did at that moment, and since when.
    graph : list of str
        Who waits for whom, as seen at that moment.
    entries : list of Entry
        What all of them did before, in the order of time.
    """

    cause: Mapping[str, Any]
    processes: dict[int, str]
    graph: list[str]
    entries: list[Entry]


def tell(flights: Mapping[int, Flight], cause: Mapping[str, Any], num_entries: int) -> Story:
    """Merge flight recorders.

    Parameters
    ----------
    flights : mapping of int to Flight
        By process number.
    cause : mapping
        Why they were kept; has the ``graph`` where a supervisor has seen a deadlock.
    num_entries : int
        How many of the last things to tell.

    Returns
    -------
    Story
        Times are those of each node's monotonic clock, laid over each other by what the time of day was when the
        recorders were kept; between nodes they are as right as their clocks.
    """
    ranks = list(_ranks(flights))
    graph = cause.get("graph")
    if not isinstance(graph, list):
        graph = describe_deadlock(ranks, rings(flights)) if sum(bool(rank.state.wait) for rank in ranks) > 1 else []
    end_ns = max((flight.wall_ns for flight in flights.values()), default=0)
    entries = [_entry(time_ns, end_ns, process, record) for time_ns, process, record in merge(flights)[-num_entries:]]
    return Story(cause, {rank.process: describe_rank(rank) for rank in ranks}, [str(line) for line in graph], entries)


def name_record(record: Record) -> str:
    """Say in a few words what a record is of."""
    if record.kind == "PHASE":
        return f"begins step {record.step}" if record.phase is Phase.TRAIN else f"begins to {_PHASES[record.phase]}"
    name = name_action(record.kind, record.stage, record.microbatch)
    other = "" if record.peer < 0 else f" process {record.peer}" + (f", tag {record.tag}" if record.tag >= 0 else "")
    direction = " to" if record.kind.startswith("SEND") else " from"
    if record.waited:
        return f"waited for {name}" + (direction + other if other else "")
    if not other:
        return name
    return f"posted {name}{direction}{other}, {record.num_bytes:,} bytes"


_PHASES = {
    Phase.SETUP: "set up",
    Phase.TRAIN: "train",
    Phase.EVALUATE: "evaluate",
    Phase.CHECKPOINT: "take a checkpoint",
    Phase.RECOVER: "recover",
    Phase.SPARE: "wait as a spare",
    Phase.FINISH: "finish",
    Phase.ENDED: "leave",
    Phase.FAILED: "leave with an error",
}


def _entry(time_ns: int, end_ns: int, process: int, record: Record) -> Entry:
    seconds = (record.end_ns - record.start_ns) * 1e-9
    return Entry((end_ns - time_ns) * 1e-9, process, name_record(record), seconds, record.step, record.epoch)


def _ranks(flights: Mapping[int, Flight]) -> Iterable[Rank]:
    """Give each process as it was when its recorder was kept."""
    for process, flight in sorted(flights.items()):
        if flight.state is not None and flight.state.phase not in OVER:
            quiet_s = max(0, flight.monotonic_ns - flight.state.event_ns) * 1e-9
            yield Rank(process, flight.state, quiet_s, quiet_s, flight.role, waits_for=flight.waits_for)
