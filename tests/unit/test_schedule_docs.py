"""The page about schedules says what the simulator says."""

import importlib.util
import re
from pathlib import Path

import pytest

from hpcpipe.schedule.build import GENERATORS
from hpcpipe.schedule.csv_file import build_from_csv

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "schedules.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_schedules", DOCS / "make_schedules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_simulator(maker):
    assert maker.page(PAGE) == PAGE, "run python docs/make_schedules.py"
    assert "| `1f1b` | 1 | 33 | 9 | 27.3 % | 4 | 48 | 1 |" in PAGE


def test_a_table_that_differs_is_seen(maker):
    assert maker.page(PAGE.replace("| 27.3 % |", "| 27.2 % |")) == PAGE
    with pytest.raises(SystemExit, match="expected one table"):
        maker.page(PAGE.replace("<!-- table p=8 m=32 -->", ""))


def test_pictures_are_those_of_the_simulator_and_small(maker):
    for name, picture in maker.pictures().items():
        file = DOCS / "images" / "schedules" / f"{name}.svg"
        assert file.read_text(encoding="utf-8") == picture, "run python docs/make_schedules.py"
        assert file.stat().st_size < 40_000


def test_every_schedule_has_a_paragraph_and_a_picture():
    for name in GENERATORS:
        section = re.search(rf"^## {re.escape(name)}\n\n(.+?)\n\n!\[{name}\]\((.+?)\)$", PAGE, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        assert (DOCS / section[2]).is_file()


def test_the_file_on_the_page_is_a_schedule():
    text = re.search(r"^# hpcpipe schedule 1\n.*?(?=^```)", PAGE, re.MULTILINE | re.DOTALL)[0]
    assert build_from_csv(text, "page").num_microbatches == 2


def test_the_command_on_the_page_prints_what_the_page_says(capsys, monkeypatch):
    from hpcpipe.cli.main import main

    for variable in ("COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    command, shown = re.search(r"^\$ hpcpipe (.+?)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL).groups()
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in shown.splitlines()]
