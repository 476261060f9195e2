"""Printing the picture of a schedule: in colour where the terminal has colours, as wide as it is."""

import shutil

from rich.console import Console
from rich.text import Text

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.draw import IDLE, Picture, draw
from hpcpipe.schedule.palette import NAMES, colours
from hpcpipe.schedule.simulate import Timeline

_UNLIMITED = 4096


def print_picture(program: Schedule, timeline: Timeline) -> None:
    """Print the picture of a schedule, and what its colours or letters mean.

    Parameters
    ----------
    program : Schedule
        The schedule.
    timeline : Timeline
        What `simulate` returned for it.
    """
    console = Console(highlight=False)
    # With 16 colours the shades of chunks become those of other kinds.
    has_colours = console.color_system in ("256", "truecolor") and not console.no_color
    width = shutil.get_terminal_size((_UNLIMITED, 24)).columns - len(rank_label(program, 0))
    picture = draw(program, timeline, max(1, width), letters=not has_colours)
    kinds = [kind for kind in NAMES if any(a.kind is kind for actions in program.actions for a in actions)]
    if has_colours:
        _print_coloured(console, program, picture, kinds)
    else:
        _print_plain(program, picture, kinds)
    if picture.note:
        print(f"({picture.note}; widen the terminal, or draw into a file with --svg)")


def rank_label(program: Schedule, rank: int) -> str:
    """Return what stands in front of a rank's row, as wide for all ranks."""
    return f"rank {rank:<{len(str(program.num_ranks - 1))}}  "


def _print_plain(program: Schedule, picture: Picture, kinds: list[Kind]) -> None:
    for rank, row in enumerate(picture.rows):
        print(rank_label(program, rank) + "".join(cell.text for cell in row))
    chunks = [] if program.num_stages == program.num_ranks else ["small letters: every second stage of a rank"]
    print(", ".join([*(f"{kind} {NAMES[kind]}" for kind in kinds), f"{IDLE} idle", *chunks]))


def _print_coloured(console: Console, program: Schedule, picture: Picture, kinds: list[Kind]) -> None:
    for rank, row in enumerate(picture.rows):
        num_chunks = len(program.stages_of(rank))
        cells = [
            (cell.text, "dim") if cell.kind is None else (cell.text, _style(cell.kind, cell.chunk, num_chunks))
            for cell in row
        ]
        console.print(Text.assemble(rank_label(program, rank), *cells), soft_wrap=True)
    legend = [part for kind in kinds for part in ((f" {kind} ", _style(kind, 0, 1)), f" {NAMES[kind]}  ")]
    console.print(Text.assemble(*legend), soft_wrap=True)


def _style(kind: Kind, chunk: int, num_chunks: int) -> str:
    background, ink = colours(kind, chunk, num_chunks)
    return f"{ink} on {background}"
