"""A picture of a schedule as SVG: one row per rank, time to the right."""

import math
from collections.abc import Iterator
from html import escape

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.draw import blocks, durations
from hpcpipe.schedule.palette import NAMES, colours
from hpcpipe.schedule.simulate import Timeline

_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 20, 84, 44
_ROW, _GAP = 26, 6
_PLOT, _WIDEST = 864, 6000
_DIGIT, _MARGIN, _TICKS = 6.4, 5, 60
_SPACE = "\u2003"

_STYLE = """\
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:#4a5563}
.a text{font-size:11px;text-anchor:middle}
.h{font-size:16px;font-weight:600;fill:#14202e}
.e{text-anchor:end}
.m{text-anchor:middle}
.p{fill:#fff;stroke:#d5dbe2}
.i{fill:#e9edf1}
.x{stroke:#b9c2cc}
@media(prefers-color-scheme:dark){text{fill:#a8b3c0}.h{fill:#eef2f6}.p{fill:#12181f;stroke:#2d3742}.i{fill:#232c36}\
.x{stroke:#4a5765}}
"""


def to_svg(schedule: Schedule, timeline: Timeline, span: float = 0.0) -> str:
    """Draw a simulated schedule as a self-contained SVG for light and dark pages.

    Parameters
    ----------
    schedule : Schedule
        Lowered or not; messages are not drawn.
    timeline : Timeline
        What `simulate` returned for it.
    span : float
        The time at the right edge, so that several pictures can have one scale; the makespan if that is later.

    Returns
    -------
    str
        The text of the file. Pointing at an action tells its name, rank, start and end.
    """
    span = max(span, timeline.makespan) or 1.0
    label = _MARGIN + _DIGIT * len(str(schedule.num_microbatches - 1))
    plot = min(_WIDEST, max(_PLOT, label * span / min(durations(timeline))))
    scale = plot / span
    num_chunks = max(len(schedule.stages_of(rank)) for rank in range(schedule.num_ranks))
    bottom = _TOP + schedule.num_ranks * (_ROW + _GAP) - _GAP
    width, height = _LEFT + plot + _RIGHT, bottom + _BOTTOM
    kinds = [kind for kind in NAMES if any(action.kind is kind for actions in schedule.actions for action in actions)]
    title = f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}"'
        f' height="{_n(height)}" role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}{''.join(_colour_rules(kinds, num_chunks))}</style>",
        f'<rect class="p" x=".5" y=".5" width="{_n(width - 1)}" height="{_n(height - 1)}" rx="8"/>',
        f'<text class="h" x="20" y="28">{escape(title)}</text>',
        f'<text x="20" y="47">{_figures(timeline)}</text>',
        _legend(kinds, num_chunks),
        *_axis(timeline.makespan, scale, bottom),
    ]
    for rank in range(schedule.num_ranks):
        y = _TOP + rank * (_ROW + _GAP)
        parts.append(f'<g transform="translate({_LEFT} {y})"><text class="e" x="-10" y="17">rank {rank}</text>')
        parts.append(f'<rect class="i" width="{_n(timeline.makespan * scale)}" height="{_ROW}" rx="3"/>')
        parts += _row(schedule, timeline, rank, scale)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _n(value: float) -> str:
    """Write a coordinate."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _colour_rules(kinds: list[Kind], num_chunks: int) -> Iterator[str]:
    for kind in kinds:
        for chunk in range(num_chunks):
            fill, ink = colours(kind, chunk, num_chunks)
            name = f"{kind}{chunk}"
            yield f".{name} rect,tspan.{name}{{fill:{fill}}}.{name} text{{fill:{ink}}}\n"


def _figures(timeline: Timeline) -> str:
    share = timeline.bubble / timeline.makespan if timeline.makespan else 0.0
    return (
        f"makespan {timeline.makespan:.4g}, bubble {timeline.bubble:.4g} ({100 * share:.0f} %), stash at most"
        f" {max(timeline.peak_stash):.4g}, messages in flight at most {timeline.max_in_flight}"
    )


def _legend(kinds: list[Kind], num_chunks: int) -> str:
    """Return one swatch per kind, with the shades of its chunks, and one for waiting."""
    parts = []
    for kind in kinds:
        shades = "".join(f'<tspan class="{kind}{chunk}">■</tspan>' for chunk in range(num_chunks))
        parts.append(f"{shades} {kind} {NAMES[kind]}")
    parts.append('<tspan class="i">■</tspan> idle')
    return f'<text x="20" y="68">{_SPACE.join(parts)}</text>'


def _axis(makespan: float, scale: float, bottom: float) -> Iterator[str]:
    """Give ticks at round times and the name of the axis."""
    least = _TICKS / scale
    power = 10.0 ** math.floor(math.log10(least))
    step = next((power * factor for factor in (1, 2, 5) if power * factor >= least), power * 10)
    y = bottom + 6
    yield f'<path class="x" d="M{_LEFT} {_n(y)}h{_n(makespan * scale)}"/>'
    for tick in range(int(makespan / step + 1e-9) + 1):
        x = _n(_LEFT + tick * step * scale)
        yield f'<path class="x" d="M{x} {_n(y)}v4"/><text class="m" x="{x}" y="{_n(y + 17)}">{tick * step:.6g}</text>'
    yield f'<text class="e" x="{_LEFT - 10}" y="{_n(y + 17)}">time</text>'


def _row(schedule: Schedule, timeline: Timeline, rank: int, scale: float) -> Iterator[str]:
    """Give the actions of a rank."""
    for block in blocks(schedule, timeline, rank):
        action = block.action
        x, width = block.start * scale, (block.end - block.start) * scale
        label = str(action.microbatch)
        fits = width >= _MARGIN + _DIGIT * len(label) - 1e-6
        text = f'<text x="{_n(x + width / 2 - 0.5)}" y="17">{label}</text>' if fits else ""
        yield (
            f'<g class="a {action.kind}{block.chunk}">'
            f"<title>{action} on rank {rank}: {block.start:.6g} to {block.end:.6g}</title>"
            f'<rect x="{_n(x)}" width="{_n(max(width - 1, width / 2))}" height="{_ROW}" rx="2"/>{text}</g>'
        )
