"""The fault matrix as a table for people, and as one object for programs."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from hpcpipe.chaos.row import Row
    from hpcpipe.chaos.runner import Result

_WIDEST = 200


def print_rows(rows: "Sequence[Row]") -> None:
    """Print what there is to run."""
    table = _table("row", "fault", "when", "ranks", "expected")
    for row in rows:
        table.add_row(row.name, row.fault, row.when, _ranks(row), row.expected.text)
    _print(table)


def print_table(results: "Sequence[Result]") -> None:
    """Print a line per row: what was expected, what was seen, and how long recoveries took."""
    table = _table("row", "fault", "when", "ranks", "expected", "seen", "held", "recovery")
    for group in _groups(results):
        row = group[0].row
        times = [seconds for result in group for seconds in result.recover_s]
        recovery = f"{statistics.median(times):.3f} s" if times else ""
        good = sum(result.is_good for result in group)
        shown = next((result for result in group if not result.is_good), group[0])
        seen = "\n".join([shown.seen, *shown.problems])
        held = ("yes" if good else "no") if len(group) == 1 else f"{good} of {len(group)}"
        table.add_row(row.name, row.fault, row.when, _ranks(row), row.expected.text, seen, held, recovery)
    _print(table)
    good, total = (len([group for group in _groups(results) if test(group)]) for test in (_has_held, bool))
    print(f"{good} of {total} rows held")


def summary(results: "Sequence[Result]") -> dict[str, Any]:
    """Return ``ok``, and ``rows``: a list of what `print_table` shows, with a list of all repetitions each."""
    rows = []
    for group in _groups(results):
        row = group[0].row
        repetitions = [
            {
                "ok": result.is_good,
                "seen": result.seen,
                "problems": result.problems,
                "recover_s": result.recover_s,
                "elapsed_s": result.elapsed_s,
            }
            for result in group
        ]
        rows.append(
            {
                "row": row.name,
                "fault": row.fault,
                "when": row.when,
                "ranks": row.pipeline * row.data,
                "spares": row.spares,
                "expected": row.expected.text,
                "ok": _has_held(group),
                "repetitions": repetitions,
            }
        )
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def _groups(results: "Sequence[Result]") -> "list[list[Result]]":
    """Put the repetitions of a row together."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.row.name, []).append(result)
    return list(groups.values())


def _has_held(group: "Sequence[Result]") -> bool:
    return all(result.is_good for result in group)


def _ranks(row: "Row") -> str:
    grid = f"{row.pipeline}" if row.data == 1 else f"{row.pipeline}x{row.data}"
    return f"{grid}+{row.spares}" if row.spares else grid


def _table(*headings: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_WIDEST)
    console.print(table)
