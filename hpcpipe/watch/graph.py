"""Who waits for whom: the wait-for graph of a deadlock in words, and what is wrong with it."""

from collections.abc import Mapping, Sequence

from hpcpipe.watch.layout import Record
from hpcpipe.watch.verdict import Rank, name_action

Rings = Mapping[int, Sequence[Record]]
"""The flight recorder of each process, oldest first."""


def signature(ranks: Sequence[Rank]) -> tuple[object, ...]:
    """Return what two equal deadlocks have in common: the step, and who waits for what; not the time or the epoch."""
    waits = [
        (
            rank.process,
            rank.state.step,
            rank.state.wait,
            rank.state.wait_stage,
            rank.state.wait_microbatch,
            rank.state.peer,
            rank.state.tag,
        )
        for rank in ranks
        if rank.is_active
    ]
    return tuple(sorted(waits))


def describe_deadlock(ranks: Sequence[Rank], rings: Rings) -> list[str]:
    """Return the graph in words, one line per rank, then the cycle, then messages that cannot meet.

    Parameters
    ----------
    ranks : sequence of Rank
        All live ones that are known.
    rings : mapping of int to sequence of Record
        Their flight recorders.
    """
    active = sorted((rank for rank in ranks if rank.is_active), key=lambda rank: rank.process)
    lines = [describe_rank(rank) for rank in active]
    cycle = find_cycle(active)
    if cycle:
        lines.append(f"cycle: process {' -> '.join(map(str, [*cycle, cycle[0]]))}")
    lines += find_mismatches(active, rings)
    return lines


def describe_rank(rank: Rank) -> str:
    """Say what a rank does, and for whom it waits."""
    state = rank.state
    if not state.wait:
        return f"{rank.name}, {rank.place}, computes, for {rank.quiet_s:.1f} s"
    since = f", for {rank.quiet_s:.1f} s"
    text = f"{rank.name}, {rank.place}, waits for "
    if state.peer < 0:
        return text + (rank.waits_for or "all ranks") + since
    ends = f"process {state.peer}" + (f", tag {state.tag}" if state.tag >= 0 else "")
    message = name_action(state.wait, state.wait_stage, state.wait_microbatch)
    return text + (f"{ends} to take {message}" if state.wait.startswith("SEND") else f"{message} from {ends}") + since


def find_cycle(ranks: Sequence[Rank]) -> list[int]:
    """Return the fewest processes that wait for each other in a circle, the lowest first; empty if there is none."""
    onward = {rank.process: _waits_for(rank, ranks) for rank in ranks}
    circles = [circle for start in sorted(onward) if (circle := _way_back(start, onward))]
    return min(circles, key=lambda circle: (len(circle), circle), default=[])


def find_mismatches(ranks: Sequence[Rank], rings: Rings) -> list[str]:
    """Say which receives wait for a message that their peer has not sent, although it has sent others.

    The end whose tag is not what it was in an earlier step is the one at fault.
    """
    lines: list[str] = []
    silent: list[str] = []
    for rank in ranks:
        state = rank.state
        if not state.wait.startswith("RECV") or state.peer < 0:
            continue
        own, peer = rings.get(rank.process, ()), rings.get(state.peer, ())
        received = [record for record in own if _is_posted(record, "RECV", state.peer, state.epoch, state.step)]
        sent = [record for record in peer if _is_posted(record, "SEND", rank.process, state.epoch, state.step)]
        if any(record.tag == state.tag for record in sent):
            continue
        message = name_action(state.wait, state.wait_stage, state.wait_microbatch)
        text = f"process {state.peer} has sent process {rank.process} nothing with tag {state.tag} in step {state.step}"
        orphans = [record for record in sent if record.tag not in {other.tag for other in received}]
        if orphans:
            name = name_action(orphans[0].kind, orphans[0].stage, orphans[0].microbatch)
            text += f"; it has sent {name} with tag {orphans[0].tag}, which process {rank.process} does not receive"
        usual = _earlier_tag(own, state.wait, state.wait_stage, state.wait_microbatch, state.step)
        if usual not in (None, state.tag):
            text += (
                f"; process {rank.process} is at fault: it posted {message} with tag {state.tag}, before with {usual}"
            )
        (lines if orphans or usual not in (None, state.tag) else silent).append(text)
    return lines or silent


def at_fault(lines: Sequence[str]) -> str:
    """Return the part of a description that names who is at fault, empty if none does."""
    return next((line.rpartition("; ")[2] for line in lines if " is at fault: " in line), "")


def _way_back(start: int, onward: Mapping[int, Sequence[int]]) -> list[int]:
    """Return the shortest way from a process over those that are waited for back to it; empty if there is none."""
    ways = [[start]]
    seen = {start}
    while ways:
        way = ways.pop(0)
        for process in onward.get(way[-1], ()):
            if process == start:
                return way
            if process not in seen:
                seen.add(process)
                ways.append([*way, process])
    return []


def _waits_for(rank: Rank, ranks: Sequence[Rank]) -> list[int]:
    """List the processes that a rank waits for; in a collective, those that wait for something else."""
    if not rank.state.wait:
        return []
    if rank.state.peer >= 0:
        return [rank.state.peer]
    return [other.process for other in ranks if other is not rank and other.state.peer >= 0]


def _is_posted(record: Record, kind: str, peer: int, epoch: int, step: int) -> bool:
    is_kind = record.kind.startswith(kind) and not record.waited
    return is_kind and record.peer == peer and record.epoch == epoch and record.step == step


def _earlier_tag(records: Sequence[Record], kind: str, stage: int, microbatch: int, step: int) -> int | None:
    """Return the tag that the same receive was posted with in the newest earlier step."""
    for record in reversed(records):
        is_same = (record.kind, record.stage, record.microbatch) == (kind, stage, microbatch)
        if is_same and not record.waited and record.step < step:
            return record.tag
    return None
