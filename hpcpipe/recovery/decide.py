"""What to do after a failure: a pure function of what all survivors know, so that nobody has to lead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from hpcpipe.errors import ExitCode
from hpcpipe.recovery.standing import NOTHING, Standing

ChooseGrid = Callable[[int], tuple[int, int] | None]
"""Takes a number of processes; returns the degrees (pipeline, data) to go on with, None if the run cannot."""


LevelAt = Callable[[int], int]


def _memory(step: int) -> int:
    return 0


class Source(Enum):
    """Where the state of a rank is found."""

    LIVE = "live"
    OWN = "own copy"
    HELD = "copy of another rank"


@dataclass(frozen=True)
class Holder:
    """Who has the state of a rank of the grid before the failure.

    Attributes
    ----------
    rank : int
        Among the survivors.
    source : Source
        What it has.
    """

    rank: int
    source: Source


@dataclass(frozen=True)
class Decision:
    """What all survivors do.

    Attributes
    ----------
    exit_code : int or None
        They leave together with this one; None if the run goes on.
    speaker : int
        The survivor that knows why they leave, -1 if all do from `reason`.
    reason : str
        Why they leave.
    pipeline, data : int
        Degrees of the new grid.
    roles : tuple of int
        The rank of each survivor in it, -1 for a spare.
    step : int
        What they go back to, -1 for what is on the disk.
    at_most : int
        Latest step that may be taken from the disk, -1 for any.
    reached : int
        The newest step that a survivor had finished, -1 if that is not known.
    holders : dict of int to Holder
        Of each rank of the grid before the failure, who has its state of `step`; empty where that is on the disk.
    """

    exit_code: int | None = None
    speaker: int = NOTHING
    reason: str = ""
    pipeline: int = 0
    data: int = 0
    roles: tuple[int, ...] = ()
    step: int = NOTHING
    at_most: int = NOTHING
    reached: int = NOTHING
    holders: dict[int, Holder] | None = None


def decide(
    standings: Sequence[Standing], pipeline: int, data: int, choose_grid: ChooseGrid, level_at: LevelAt = _memory
) -> Decision:
    """Decide what the survivors of a failure do.

    Parameters
    ----------
    standings : sequence of Standing
        One per survivor, in the order of their ranks.
    pipeline, data : int
        Degrees of the grid before the failure.
    choose_grid : callable
        Says what to go on with where there are fewer survivors than ranks.
    level_at : callable
        Takes the newest step that a rank has reached, -1 if that is not known, and returns how to go on. 0: from memory
        where that is possible. 1: from the disk, since memory has not helped. 2: not any more.
    """
    for rank, one in enumerate(standings):
        if one.failed:
            return Decision(one.failed, rank)
    working = [rank for rank, one in enumerate(standings) if not one.is_spare]
    if working and all(standings[rank].finished for rank in working):
        return Decision(standings[working[0]].finished - 1, working[0])
    level = level_at(reached_by(standings))
    if level > 1:
        return Decision(ExitCode.STOPPED, reason="ranks keep failing before a step is done, also from the checkpoint")
    degrees = pipeline, data
    if len(standings) < pipeline * data:
        chosen = choose_grid(len(standings))
        if chosen is None:
            left = f"{len(standings)} processes are left for {pipeline * data} ranks"
            reason = f"{left}, and the model cannot be cut for so few; `hpcpipe launch --spares` keeps some in reserve"
            return Decision(ExitCode.STOPPED, reason=reason)
        degrees = chosen
    roles = assign(standings, (pipeline, data), degrees)
    rewind = max(one.rewind for one in standings)
    step = NOTHING
    holders: dict[int, Holder] = {}
    if level == 0 and rewind == NOTHING and all(one.is_ready for one in standings if not one.is_spare):
        step, holders = newest(standings, pipeline * data)
    return Decision(None, NOTHING, "", *degrees, roles, step, rewind, reached_by(standings), holders)


def reached_by(standings: Sequence[Standing]) -> int:
    """Return the newest step that any survivor has finished, or holds a copy of; -1 if none has."""
    return max(max(one.live, *one.own, *(step for steps in one.held for step in steps)) for one in standings)


def newest(standings: Sequence[Standing], num_roles: int) -> tuple[int, dict[int, Holder]]:
    """Return the newest step that every rank's state is held of, and who holds it; -1 and nothing if there is none.

    Parameters
    ----------
    standings : sequence of Standing
        Of the survivors.
    num_roles : int
        Ranks of the grid before the failure.
    """
    versions: list[dict[int, Holder]] = [{} for _ in range(num_roles)]
    for source in (Source.HELD, Source.OWN, Source.LIVE):
        for rank in reversed(range(len(standings))):
            for role, steps in _offers(standings[rank], source):
                for step in steps:
                    if step != NOTHING:
                        versions[role][step] = Holder(rank, source)
    common = set.intersection(*(set(held) for held in versions))
    if not common:
        return NOTHING, {}
    step = max(common)
    return step, {role: held[step] for role, held in enumerate(versions)}


def _offers(one: Standing, source: Source) -> list[tuple[int, tuple[int, ...]]]:
    """Return the ranks whose state a survivor has, and of which steps."""
    if source is Source.HELD:
        return list(enumerate(one.held))
    if one.is_spare:
        return []
    return [(one.role, one.own if source is Source.OWN else (one.live,))]


def assign(standings: Sequence[Standing], before: tuple[int, int], after: tuple[int, int]) -> tuple[int, ...]:
    """Return the new role of each survivor: its old one, or one of the same stage, wherever that is possible.

    Parameters
    ----------
    standings : sequence of Standing
        Of the survivors, at least as many as the new grid has ranks.
    before, after : (int, int)
        Degrees (pipeline, data) of the old grid and the new one.
    """
    pipeline, data = after
    roles = [NOTHING] * len(standings)
    free = list(range(len(standings)))
    missing = []
    for role in range(pipeline * data):
        alike = [rank for rank in free if before == after and standings[rank].role == role]
        if not alike and before[0] == pipeline and before != after:
            alike = [rank for rank in free if _stage(standings[rank], pipeline) == role % pipeline]
            alike.sort(key=lambda rank: standings[rank].role)
        if alike:
            roles[alike[0]] = role
            free.remove(alike[0])
        else:
            missing.append(role)
    # Spares first, then ranks that have lost their place.
    free.sort(key=lambda rank: (not standings[rank].is_spare, standings[rank].role, rank))
    if before != after and before[0] != pipeline:
        free.sort(key=lambda rank: (standings[rank].is_spare, standings[rank].role, rank))
    for role, rank in zip(missing, free, strict=False):
        roles[rank] = role
    return tuple(roles)


def _stage(one: Standing, pipeline: int) -> int:
    return NOTHING if one.is_spare else one.role % pipeline
