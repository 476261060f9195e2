"""A picture of a schedule in characters: one row per rank, time to the right."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hpcpipe.schedule.action import COMPUTE, Action, Kind, Schedule
from hpcpipe.schedule.simulate import Timeline

IDLE = "·"


@dataclass(frozen=True)
class Cell:
    """A piece of a row.

    Attributes
    ----------
    text : str
        As many characters as the piece is wide.
    kind : Kind or None
        What the rank computes; None where it waits.
    chunk : int
        Which of the rank's stages it computes, in ascending order.
    """

    text: str
    kind: Kind | None
    chunk: int


@dataclass(frozen=True)
class Picture:
    """Rows of cells, one row per rank, all of one width.

    Attributes
    ----------
    rows : tuple of tuple of Cell
        From rank 0.
    note : str
        What the picture does not show because of its width, or "".
    """

    rows: tuple[tuple[Cell, ...], ...]
    note: str


@dataclass(frozen=True)
class Block:
    """An action on the time axis, and which of its rank's stages it computes, in ascending order."""

    action: Action
    chunk: int
    start: float
    end: float


def blocks(schedule: Schedule, timeline: Timeline, rank: int) -> Iterator[Block]:
    """Give the compute actions of a rank, with their times.

    Parameters
    ----------
    schedule : Schedule
        Lowered or not.
    timeline : Timeline
        What `simulate` returned for it.
    rank : int
        The pipeline rank.
    """
    chunks = {stage: chunk for chunk, stage in enumerate(schedule.stages_of(rank))}
    actions = [action for action in schedule.actions[rank] if action.kind in COMPUTE]
    for action, start, end in zip(actions, timeline.starts[rank], timeline.ends[rank], strict=True):
        yield Block(action, chunks[action.stage], start, end)


def durations(timeline: Timeline) -> list[float]:
    """Return what all actions take, those that take no time left out; at least one number."""
    pairs = zip(timeline.starts, timeline.ends, strict=True)
    taken = [end - start for starts, ends in pairs for start, end in zip(starts, ends, strict=True)]
    return [duration for duration in taken if duration > 0] or [1.0]


def draw(schedule: Schedule, timeline: Timeline, width: int, letters: bool) -> Picture:
    """Draw a simulated schedule.

    Time is scaled so that every action has room for its label if the width allows, and is never stretched beyond that.
    A picture that would give most actions less than a character is cut at the right.

    Parameters
    ----------
    schedule : Schedule
        Lowered or not; messages are not drawn.
    timeline : Timeline
        What `simulate` returned for it.
    width : int
        Most characters of a row.
    letters : bool
        Whether the label of an action starts with its kind, for pictures without colour: a capital letter on the even
        chunks of a rank, a small one on the odd. Else it is the microbatch alone.
    """
    taken = durations(timeline)
    shortest, mean = min(taken), sum(taken) / len(taken)
    label_width = len(str(schedule.num_microbatches - 1)) + letters
    scale = _scale(timeline.makespan or 1.0, shortest, mean, label_width, width)
    columns = min(width, round(timeline.makespan * scale))
    rows = tuple(_row(schedule, timeline, rank, scale, columns, letters) for rank in range(schedule.num_ranks))
    if columns < round(timeline.makespan * scale):
        return Picture(rows, f"cut at time {columns / scale:.6g} of {timeline.makespan:.6g}")
    if math.floor(shortest * scale + 1e-9) < label_width:
        return Picture(rows, "too narrow for all microbatch numbers")
    return Picture(rows, "")


def _scale(makespan: float, shortest: float, mean: float, label_width: int, width: int) -> float:
    """Return characters per unit of time."""
    scale = min(width / makespan, (label_width + 1) / shortest)
    if scale * shortest >= 1:
        # Whole characters for the shortest action, so that equal actions look equal.
        return math.floor(scale * shortest + 1e-9) / shortest
    return max(scale, 1 / max(shortest, mean / 4))


def _row(
    schedule: Schedule, timeline: Timeline, rank: int, scale: float, columns: int, letters: bool
) -> tuple[Cell, ...]:
    """Return the cells of a rank, idle ones included."""
    cells = []
    column = 0
    for block in blocks(schedule, timeline, rank):
        first, last = (min(columns, round(time * scale)) for time in (block.start, block.end))
        if first > column:
            cells.append(Cell(IDLE * (first - column), None, 0))
        if last > first:
            cells.append(Cell(_label(block, last - first, letters), block.action.kind, block.chunk))
        column = last
    if column < columns:
        cells.append(Cell(IDLE * (columns - column), None, 0))
    return tuple(cells)


def _label(block: Block, width: int, letters: bool) -> str:
    """Return as much of an action's label as there is room for: the letter first, then the last digits."""
    number = str(block.action.microbatch)
    if not letters:
        return number[-width:].ljust(width)
    letter = block.action.kind.lower() if block.chunk % 2 else block.action.kind.value
    return (f"{letter}{number}" if len(number) < width else letter).ljust(width)
