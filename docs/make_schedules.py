"""Write the tables and pictures of docs/schedules.md: ``python docs/make_schedules.py``."""

import re
from pathlib import Path

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.build import GENERATORS, build
from hpcpipe.schedule.simulate import Costs, Timeline, simulate
from hpcpipe.schedule.svg import to_svg

PAGE = Path(__file__).parent / "schedules.md"
PICTURES = Path(__file__).parent / "images" / "schedules"
SIZES = ((4, 8), (8, 32))
# All pictures have the time scale of the longest schedule.
_SPAN = 33.0
_MORE_CHUNKS = {"interleaved": 4, "interleaved-zb": 4}
_COLUMNS = ("schedule", "stages per rank", "makespan", "bubble", "share", "largest stash", "messages", "in flight")


def table(num_ranks: int, num_microbatches: int) -> str:
    """Return the Markdown table of all schedules for one size.

    Parameters
    ----------
    num_ranks, num_microbatches : int
        The size of the pipeline and of the step.
    """
    rows = [_COLUMNS, ("---",) + ("--:",) * (len(_COLUMNS) - 1)]
    for name in GENERATORS:
        for chunks in (0, *([_MORE_CHUNKS[name]] if name in _MORE_CHUNKS else [])):
            schedule, timeline = _simulated(name, num_ranks, num_microbatches, chunks)
            messages = sum(a.kind in (Kind.SEND_F, Kind.SEND_B) for actions in schedule.actions for a in actions)
            figures = (timeline.makespan, timeline.bubble)
            share = f"{100 * timeline.bubble / timeline.makespan:.1f} %"
            rows.append(
                (
                    f"`{name}`",
                    str(schedule.num_stages // num_ranks),
                    *(f"{figure:g}" for figure in figures),
                    share,
                    f"{max(timeline.peak_stash):g}",
                    str(messages),
                    str(timeline.max_in_flight),
                )
            )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(text: str) -> str:
    """Return the text of the page with its tables made anew.

    Parameters
    ----------
    text : str
        The page as it is; each table stands between two comments that name its size.
    """
    for size in SIZES:
        begin, end = (f"<!-- {word} p={size[0]} m={size[1]} -->\n" for word in ("table", "end"))
        pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
        text, found = pattern.subn(lambda match, size=size: f"{match[1]}\n{table(*size)}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"{PAGE}: expected one table between {begin.strip()} and {end.strip()}")
    return text


def pictures() -> dict[str, str]:
    """Return the SVG of every schedule, by its name, for the first size."""
    return {name: to_svg(*_simulated(name, *SIZES[0]), span=_SPAN) for name in GENERATORS}


def _simulated(name: str, num_ranks: int, num_microbatches: int, chunks: int = 0) -> tuple[Schedule, Timeline]:
    schedule = build(name, num_ranks, num_microbatches, chunks)
    return schedule, simulate(schedule, Costs.uniform(schedule))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for schedule_name, picture in pictures().items():
        (PICTURES / f"{schedule_name}.svg").write_text(picture, encoding="utf-8")
