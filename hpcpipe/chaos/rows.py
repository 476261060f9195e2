"""The fault matrix: its rows, and why some are left out."""

from collections.abc import Sequence
from difflib import get_close_matches

from hpcpipe.chaos import rows_hangs, rows_numbers, rows_recovery, rows_surroundings
from hpcpipe.chaos.row import Row
from hpcpipe.errors import UsageError

ROWS: tuple[Row, ...] = (*rows_recovery.ROWS, *rows_hangs.ROWS, *rows_numbers.ROWS, *rows_surroundings.ROWS)


def choose(names: Sequence[str]) -> list[Row]:
    """Return the rows of some names, or all that are not slow.

    Parameters
    ----------
    names : sequence of str
        Numbers, for all cases of a row, or names of cases, such as ``10.plan``; none: all rows that are not slow.

    Raises
    ------
    UsageError
        There is no such row.
    """
    if not names:
        return [row for row in ROWS if not row.is_slow]
    for name in names:
        if not any(name in (row.name, str(row.number)) for row in ROWS):
            raise UsageError(f"--rows {name}: no such row; {_nearest(name)}")
    return [row for row in ROWS if row.name in names or str(row.number) in names]


def _nearest(name: str) -> str:
    close = get_close_matches(name, [row.name for row in ROWS], n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(dict.fromkeys(str(row.number) for row in ROWS))}"
