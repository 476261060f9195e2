"""Schedules as CSV: one line per rank, one action per cell, so that a spreadsheet or a few lines of code can make one.

A file of ours starts with three lines that no other program writes; then one line per rank follows::

    # hpcpipe schedule 1
    # microbatches: 2
    # stage_to_rank: 0 1
    F0.0,F0.1,B0.0,B0.1
    F1.0,B1.0,F1.1,B1.1

Without these lines the file is read like PyTorch's: which rank holds which stage follows from where the actions stand.
Either spelling of an action is read in either file: ours, ``F2.0``, and that of PyTorch's pipelining schedules,
``2F0``, where two actions that PyTorch would overlap stand in one cell, ``(0F7;3B7)OVERLAP_F_B``, and run here one
after the other. Empty cells are idle turns and mean nothing, because a schedule is an order, not a clock. Lines
that start with ``#`` are comments.
"""

import re
from dataclasses import dataclass

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import COMPUTE, UPDATE, Action, Kind, Schedule
from hpcpipe.schedule.check import check
from hpcpipe.schedule.lower import lower, with_updates

_MARK = "# hpcpipe schedule 1"
_KEYS = ("microbatches", "stage_to_rank")
_OURS = re.compile(r"([A-Z]+(?:_[A-Z]+)?)(\d{1,9})(?:\.(\d{1,9}))?")
_PYTORCH = re.compile(r"(\d{1,9})([A-Z]+(?:_[A-Z]+)?)(\d{1,9})")
_OVERLAP = re.compile(r"\(([^()]*)\)OVERLAP_F_B")
_PYTORCH_ONLY = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)\d*")
_EXPECTED = "expected an action such as F2.0 or 2F0, or nothing"


@dataclass(frozen=True)
class _Cell:
    """An action, and where it was found: line and cell count from 1, the rank from 0."""

    action: Action
    rank: int
    line: int
    number: int


def write_csv(schedule: Schedule) -> str:
    """Return the text of a file from which `read_csv` makes the same schedule.

    Parameters
    ----------
    schedule : Schedule
        With messages or without.
    """
    placement = " ".join(map(str, schedule.stage_to_rank))
    head = [_MARK, f"# microbatches: {schedule.num_microbatches}", f"# stage_to_rank: {placement}"]
    return "\n".join([*head, *(",".join(map(str, actions)) for actions in schedule.actions), ""])


def read_csv(text: str, name: str) -> Schedule:
    """Read a schedule from the text of a CSV file, ours or PyTorch's.

    Parameters
    ----------
    text : str
        The file's text.
    name : str
        What the schedule is called, in errors too: the file's name.

    Returns
    -------
    Schedule
        The actions as they stand in the file; `check` has not seen them.

    Raises
    ------
    UsageError
        With the line and the cell, for what is no action, or stands on a rank that does not hold its stage.
    """
    head, lines = _split(text, name)
    cells = [
        _Cell(action, rank, line, number)
        for rank, (line, row) in enumerate(lines)
        for number, content in enumerate(row.split(","), 1)
        for action in _parse(content.strip().strip('"').strip(), name, line, number)
    ]
    if not cells:
        raise UsageError(f"schedule {name}: the file holds no action: write one line per rank, such as F0.0,B0.0")
    active = {cell.rank for cell in cells}
    for rank, (line, _) in enumerate(lines):
        if rank not in active:
            raise UsageError(f"schedule {name}, line {line}: rank {rank} has no action: every rank needs a stage")

    if head:
        num_microbatches = _number(*head["microbatches"], name)
        placement = _declared(*head["stage_to_rank"], len(lines), name)
    else:
        num_microbatches = 1 + max(cell.action.microbatch for cell in cells)
        placement = _inferred(cells, name)
    # A mistyped number must not make later steps allocate tables of that size.
    if num_microbatches * len(placement) > len(cells):
        needed = f"{num_microbatches} microbatches through {len(placement)} stages"
        raise UsageError(f"schedule {name}: {needed} need more actions than the {len(cells)} of the file")
    for cell in cells:
        _, stage, k = cell.action
        if stage >= len(placement) or k >= num_microbatches:
            limits = f"{len(placement)} stages and {num_microbatches} microbatches, counted from 0"
            raise _wrong(cell, name, f"the file has {limits}")
        if placement[stage] != cell.rank:
            raise _wrong(cell, name, f"stage {stage} belongs to rank {placement[stage]}, and this is rank {cell.rank}")
    lists: list[list[Action]] = [[] for _ in lines]
    for cell in cells:
        lists[cell.rank].append(cell.action)
    return Schedule(name, num_microbatches, placement, tuple(map(tuple, lists)))


def build_from_csv(text: str, name: str) -> Schedule:
    """Read a schedule, add the messages and updates that the file lacks, and prove it; parameters as in `read_csv`.

    Returns
    -------
    Schedule
        The lowered schedule, ready to be executed.

    Raises
    ------
    UsageError
        If the file cannot be read, or the schedule breaks a rule of `check`.
    """
    schedule = read_csv(text, name)
    kinds = {action.kind for actions in schedule.actions for action in actions}
    if kinds <= COMPUTE:
        schedule = lower(schedule)
    elif not kinds & UPDATE:
        schedule = with_updates(schedule)
    check(schedule)
    return schedule


def _split(text: str, name: str) -> tuple[dict[str, tuple[str, int]], list[tuple[int, str]]]:
    """Return the head of a file of ours, by key, and the numbered lines of the ranks."""
    lines = list(enumerate(text.removeprefix("\ufeff").splitlines(), 1))
    rows = [(number, line) for number, line in lines if not line.startswith("#")]
    while rows and not rows[-1][1].strip():
        rows.pop()
    mark = next(((number, line) for number, line in lines if line.startswith(_MARK.rstrip("1"))), None)
    if mark is None:
        return {}, rows
    if mark[1].strip() != _MARK:
        raise UsageError(f"schedule {name}, line {mark[0]}: expected '{_MARK}', the only version there is")
    found = [(re.fullmatch(r"#\s*(\w+):\s*(.*?)\s*", line), number) for number, line in lines]
    head = {match[1]: (match[2], number) for match, number in found if match and match[1] in _KEYS}
    for key in _KEYS:
        if key not in head:
            raise UsageError(f"schedule {name}: the file starts with '{_MARK}' but has no line '# {key}: ...'")
    return head, rows


def _parse(content: str, name: str, line: int, number: int) -> list[Action]:
    """Return the actions of a cell: none, one, or two that PyTorch would overlap."""
    if not content:
        return []
    overlapped = _OVERLAP.fullmatch(content)
    actions = []
    for part in overlapped[1].split(";") if overlapped else [content]:
        word = part.strip()
        if match := _OURS.fullmatch(word):
            kind, stage, k = match.groups()
        elif match := _PYTORCH.fullmatch(word):
            stage, kind, k = match.groups()
        if match is not None and kind in Kind.__members__ and (k is None) != (kind in UPDATE):
            match = None
        if match is None or kind not in Kind.__members__:
            hint = _EXPECTED
            if _PYTORCH_ONLY.fullmatch(word):
                hint = "PyTorch's sharding actions have no meaning here: export its compute-only schedule"
            elif match is not None:
                hint = f"there is no kind {kind}: choose from {', '.join(Kind)}"
            raise UsageError(f"schedule {name}, line {line}, cell {number}, '{word}': {hint}")
        actions.append(Action(Kind(kind), int(stage), int(k or 0)))
    return actions


def _wrong(cell: _Cell, name: str, rule: str) -> UsageError:
    return UsageError(f"schedule {name}, line {cell.line}, cell {cell.number}, {cell.action}: {rule}")


def _inferred(cells: list[_Cell], name: str) -> tuple[int, ...]:
    """Return the rank of each stage from where its actions stand."""
    first: dict[int, _Cell] = {}
    for cell in cells:
        known = first.setdefault(cell.action.stage, cell)
        if known.rank != cell.rank:
            where = f"{known.action} in line {known.line}, cell {known.number}, puts it on rank {known.rank}"
            raise _wrong(cell, name, f"stage {cell.action.stage} cannot be on rank {cell.rank}: {where}")
    for stage, cell in enumerate(sorted(first.values(), key=lambda cell: cell.action.stage)):
        if cell.action.stage != stage:
            raise _wrong(cell, name, f"the file has no action of stage {stage}: stages count from 0 without a gap")
    return tuple(first[stage].rank for stage in range(len(first)))


def _declared(value: str, line: int, num_ranks: int, name: str) -> tuple[int, ...]:
    """Return the rank of each stage as the file's head says."""
    placement = tuple(_number(word, line, name) for word in value.split())
    if set(placement) != set(range(num_ranks)):
        ranks = f"has {num_ranks} line{'s' * (num_ranks > 1)} of actions, one per rank"
        raise UsageError(f"schedule {name}, line {line}: stage_to_rank is '{value}', but the file {ranks}")
    return placement


def _number(word: str, line: int, name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", word):
        raise UsageError(f"schedule {name}, line {line}: expected a whole number, not '{word}'")
    return int(word)
