"""The page about numerics lists every cell of the matrix of schedules, and what is not defined with the true reason."""

import importlib.util
import re
from pathlib import Path

import pytest
from support.schedule_cells import PIPELINES, VARIANTS, always_run, legal_counts, microbatch_counts, refusal

from hpcpipe.schedule.build import GENERATORS, build

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "numerics.md").read_text(encoding="utf-8")
REFUSED = [
    pytest.param(variant, p, m, id=f"{variant}-p{p}-m{m}")
    for variant in VARIANTS
    for p in PIPELINES
    for m in microbatch_counts(p)
    if refusal(variant, p, m) is not None
]


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_same_bits_table", DOCS / "make_same_bits_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(columns):
    """Return the cells of the page's table rows with so many columns, without the two of the table's head."""
    section = PAGE[PAGE.index("<!-- same bits -->") : PAGE.index("<!-- end same bits -->")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return [row for row in cells if len(row) == columns][2:]


def numbers(text):
    return [int(word) for word in text.split(", ")] if text else []


def test_the_tables_are_up_to_date(maker):
    assert maker.page(PAGE) == PAGE, "run python docs/make_same_bits_table.py"


def test_every_schedule_is_listed_and_every_cell_is_either_compared_or_refused():
    defined = {(row[0].strip("`"), int(row[1])): list(map(numbers, row[2:])) for row in rows(7)}
    assert {name for name, _ in defined} == set(GENERATORS) - {"forward"}
    refused = {(row[0].strip("`"), n, int(row[2])): numbers(row[3]) for row in rows(5) for n in numbers(row[1])}
    for variant in VARIANTS:
        for pipeline, listed in zip(PIPELINES, defined[variant.name, variant.chunks], strict=True):
            assert listed == legal_counts(variant, pipeline)
            left_out = refused.get((variant.name, variant.chunks, pipeline), [])
            assert sorted(listed + left_out) == microbatch_counts(pipeline)


def test_a_table_that_differs_is_seen(maker):
    assert maker.page(PAGE.replace("| `1f1b` | 1 | 1, 2, 3 |", "| `1f1b` | 1 | 1, 2 |")) == PAGE
    with pytest.raises(SystemExit, match="expected the tables"):
        maker.page(PAGE.replace("<!-- end same bits -->", ""))


@pytest.mark.parametrize(("variant", "pipeline", "microbatches"), REFUSED)
def test_a_refusal_names_the_numbers_and_a_cure_that_works(variant, pipeline, microbatches):
    reason = refusal(variant, pipeline, microbatches)
    assert re.search(rf"\b{pipeline} ranks\b", reason) and re.search(rf"\b{microbatches}\b", reason)
    cures = re.findall(r"\d+", reason.partition("set parallel.microbatches = ")[2])
    assert cures
    for cure in map(int, cures):
        build(variant.name, pipeline, cure, variant.chunks)


def test_no_schedule_is_left_out_of_the_tests_that_always_run():
    for variant in VARIANTS:
        for pipeline in PIPELINES:
            assert always_run(variant, pipeline)
