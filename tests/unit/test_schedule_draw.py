"""Pictures of schedules: what every cell and every rectangle stands for."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from hpcpipe.schedule.action import COMPUTE, Action, Kind, Schedule
from hpcpipe.schedule.build import GENERATORS, build
from hpcpipe.schedule.draw import IDLE, draw
from hpcpipe.schedule.palette import colours
from hpcpipe.schedule.simulate import Costs, simulate
from hpcpipe.schedule.svg import to_svg

SVG = "{http://www.w3.org/2000/svg}"


def simulated(name, p, m, chunks=0, costs=(1, 1, 1), message=0.0):
    schedule = build(name, p, m, chunks)
    return schedule, simulate(schedule, Costs.uniform(schedule, *costs, message))


def lines(picture):
    return ["".join(cell.text for cell in row) for row in picture.rows]


def test_a_small_picture_in_full():
    picture = draw(*simulated("1f1b", 3, 4), width=60, letters=True)
    assert lines(picture) == [
        "F0 F1 F2 ············B0    F3 B1    ···B2    ···B3    ",
        "···F0 F1 ······B0    F2 B1    F3 B2    ···B3    ······",
        "······F0 B0    F1 B1    F2 B2    F3 B3    ············",
    ]
    assert picture.note == ""


def test_colour_leaves_the_letters_out_and_says_kind_and_chunk():
    picture = draw(*simulated("zb-v", 2, 2), width=22, letters=False)
    kinds = [(str(cell.kind), cell.chunk, cell.text.strip()) for cell in picture.rows[0] if cell.kind is not None]
    expected = [
        (str(action.kind), 0 if action.stage == 0 else 1, str(action.microbatch))
        for action in build("zb-v", 2, 2).actions[0]
        if action.kind in COMPUTE
    ]
    assert kinds == expected


@pytest.mark.parametrize("width", [1, 7, 30, 79, 200, 4096])
@pytest.mark.parametrize("name", GENERATORS)
def test_rows_have_one_width_that_fits(name, width):
    for p, m, costs in ((1, 2, (1, 1, 1)), (4, 8, (1, 1.3, 0.7)), (3, 12, (0.002, 0.0, 0.0005))):
        schedule, timeline = simulated(name, p, m, costs=costs, message=0.1)
        for letters in (False, True):
            picture = draw(schedule, timeline, width, letters)
            assert len(picture.rows) == p
            widths = set(map(len, lines(picture)))
            assert len(widths) == 1 and 0 < widths.pop() <= width


@pytest.mark.parametrize("name", GENERATORS)
def test_with_room_every_action_shows_kind_and_microbatch_in_order(name):
    schedule, timeline = simulated(name, 3, 12)
    picture = draw(schedule, timeline, 4096, letters=True)
    assert picture.note == ""
    for rank, row in enumerate(picture.rows):
        shown = [cell.text.strip().upper() for cell in row if cell.kind is not None]
        compute = [action for action in schedule.actions[rank] if action.kind in COMPUTE]
        assert shown == [f"{action.kind}{action.microbatch}" for action in compute]
        assert all(set(cell.text) == {IDLE} for cell in row if cell.kind is None)


def test_letters_tell_chunks_apart():
    row = draw(*simulated("interleaved", 2, 4), width=4096, letters=True).rows[0]
    shown = [cell.text.strip() for cell in row if cell.kind is not None][:6]
    assert shown == ["F0", "F1", "f0", "f1", "F2", "b0"]


def test_what_does_not_fit_is_said():
    schedule, timeline = simulated("1f1b", 4, 16)
    assert draw(schedule, timeline, 60, letters=True).note == "too narrow for all microbatch numbers"
    assert "FB9FB FB " in lines(draw(schedule, timeline, 60, letters=True))[3]
    cut = draw(schedule, timeline, 30, letters=True)
    assert cut.note == "cut at time 30 of 57"
    assert lines(cut)[3] == "···FB0FB1FB2FB3FB4FB5FB6FB7FB8"
    digits = draw(schedule, timeline, 60, letters=False)
    assert [cell.text for cell in digits.rows[0] if cell.kind is Kind.F][-3:] == ["3", "4", "5"]


def test_equal_actions_are_equally_wide():
    row = draw(*simulated("interleaved", 4, 8), width=100, letters=False).rows[0]
    for kind in (Kind.F, Kind.B):
        assert len({len(cell.text) for cell in row if cell.kind is kind}) == 1


def read_svg(text):
    """Return the root, and for each rank its (title, x, width, number) of actions."""
    root = ElementTree.fromstring(text)
    ranks = []
    for group in root.findall(f"{SVG}g"):
        actions = []
        for action in group.findall(f"{SVG}g"):
            box, number = action.find(f"{SVG}rect"), action.find(f"{SVG}text")
            title = action.findtext(f"{SVG}title")
            actions.append(
                (title, float(box.get("x")), float(box.get("width")), None if number is None else number.text)
            )
        ranks.append(actions)
    return root, ranks


@pytest.mark.parametrize("name", GENERATORS)
def test_svg_holds_every_action_once_in_its_place(name):
    schedule, timeline = simulated(name, 4, 8)
    root, ranks = read_svg(to_svg(schedule, timeline))
    width = float(root.get("width"))
    assert len(ranks) == 4
    for rank, actions in enumerate(ranks):
        compute = [action for action in schedule.actions[rank] if action.kind in COMPUTE]
        times = zip(compute, timeline.starts[rank], timeline.ends[rank], strict=True)
        titles = [f"{action} on rank {rank}: {start:g} to {end:g}" for action, start, end in times]
        assert [title for title, _, _, _ in actions] == titles
        assert [number for _, _, _, number in actions] == [str(action.microbatch) for action in compute]
        edges = [edge for _, x, box, _ in actions for edge in (x, x + box)]
        assert edges == sorted(edges) and edges[0] >= 0 and edges[-1] < width


def test_svg_is_one_small_file_that_needs_nothing_else():
    for name in GENERATORS:
        text = to_svg(*simulated(name, 4, 8))
        assert len(text.encode()) < 40_000
        assert not re.search(r"href|url\(|@import|<script|<image", text)
        assert "prefers-color-scheme:dark" in text


def test_svg_has_legend_axis_and_figures():
    root, _ = read_svg(to_svg(*simulated("zb-h1", 4, 8)))
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    assert texts[0] == "zb-h1: 4 ranks, 8 microbatches"
    assert texts[1] == "makespan 27, bubble 3 (11 %), stash at most 4, messages in flight at most 1"
    assert "I input gradient" in texts[2] and "B backward" in texts[2] and "idle" in texts[2]
    plain = read_svg(to_svg(*simulated("1f1b", 4, 8)))[0]
    assert not any("I input gradient" in "".join(element.itertext()) for element in plain.iter(f"{SVG}text"))
    assert {"time", "0", "2", "26", "rank 3"} <= set(texts)


@pytest.mark.parametrize("unit", [1e-4, 0.37, 1.0, 5e5])
def test_svg_axis_fits_any_unit(unit):
    root, _ = read_svg(to_svg(*simulated("1f1b", 2, 4, costs=(unit, unit, unit))))
    ticks = [element for element in root.iter(f"{SVG}text") if element.get("class") == "m"]
    assert 4 <= len(ticks) <= 15


def test_pictures_of_one_span_have_one_scale():
    wide = read_svg(to_svg(*simulated("1f1b", 4, 8), span=36))[1][0][0]
    same = read_svg(to_svg(*simulated("zb-h1", 4, 8), span=36))[1][0][0]
    own = read_svg(to_svg(*simulated("zb-h1", 4, 8)))[1][0][0]
    assert wide[2] == same[2] < own[2]


def test_a_name_cannot_leave_its_place_in_the_file():
    schedule = Schedule("<script>&\"'", 1, (0,), ((Action(Kind.F, 0, 0), Action(Kind.B, 0, 0)),))
    root, _ = read_svg(to_svg(schedule, simulate(schedule, Costs.uniform(schedule))))
    assert root.get("aria-label").startswith("<script>&\"'")


def test_text_stands_out_from_every_shade():
    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    seen = set()
    for kind in COMPUTE:
        for chunk in range(4):
            background, ink = colours(kind, chunk, 4)
            seen.add(background)
            light, dark = sorted((luminance(background), luminance(ink)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 3.5
    assert len(seen) == 16
