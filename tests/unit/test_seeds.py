"""The seeds notes name only what exists, and their index counts what they say."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.seeds import Claim, index, problems, read_notes, table_rows

ROOT = Path(__file__).parents[2]
NOTES = read_notes(ROOT / "seeds")


def test_every_source_has_a_note():
    assert [note[0] for note in NOTES] == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("note", NOTES)
def test_a_note_holds(note):
    assert problems(ROOT, NOTES[note]) == []


@pytest.mark.parametrize("note", NOTES)
def test_a_note_says_what_its_source_is_worth(note):
    text = (ROOT / "seeds" / note).read_text()
    assert text.startswith(f"# {note[0].upper()}. ")
    assert "\nKind: " in text
    assert "\nTrust: " in text


def test_the_index_counts_the_notes():
    assert index(NOTES) in (ROOT / "seeds" / "README.md").read_text(), f"put this into the README:\n{index(NOTES)}"


GOOD = Claim(
    "a-note.md",
    "A1",
    "A claim.",
    "",
    "partly",
    "in `hpcpipe.config.load` and `docs/configuration.md`",
    "`tests/unit/test_seeds.py::test_broken_rows_are_seen`",
)


def test_a_good_row_has_no_problem():
    assert problems(ROOT, [GOOD, replace(GOOD, id="A2", status="planned", where="later", proof="")]) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"id": "A2"}, "expected A1"),
        ({"claim": ""}, "no claim"),
        ({"status": "done"}, "unknown status 'done'"),
        ({"where": "somewhere"}, "needs a place and a proof"),
        ({"proof": ""}, "needs a place and a proof"),
        ({"status": "planned", "proof": "soon"}, "names nothing"),
        ({"where": "`hpcpipe.config.garage`"}, "hpcpipe.config.garage does not exist"),
        ({"where": "`docs/garage.md`"}, "docs/garage.md does not exist"),
        ({"proof": "`tests/unit/test_seeds.py::test_garage`"}, "test_garage does not exist"),
        ({"proof": "`tests/unit/test_garage.py::test_x`"}, "test_x does not exist"),
    ],
)
def test_broken_rows_are_seen(change, problem):
    assert problem in "\n".join(problems(ROOT, [replace(GOOD, **change)]))


def test_tables_of_another_form_are_refused():
    head = "| id | claim | figure | status | where it is met | proof |\n|---|---|---|---|---|---|\n"
    assert table_rows(head + "| A1 | x | | met | y | z |") == [["A1", "x", "", "met", "y", "z"]]
    with pytest.raises(ValueError, match="columns"):
        table_rows("| id | claim |\n|---|---|\n")
    with pytest.raises(ValueError, match="cells"):
        table_rows(head + "| A1 | x |")
