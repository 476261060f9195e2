"""docs/errors.md and the code tell the same about exit codes."""

import re
from pathlib import Path

from hpcpipe.errors import BY_CODE, MEANING, ExitCode

ERRORS = (Path(__file__).parents[2] / "docs/errors.md").read_text()


def test_the_table_is_the_code_s() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \|$", ERRORS, re.MULTILINE)
    assert {int(code): meaning for code, meaning, _ in rows} == {int(code): text for code, text in MEANING.items()}
    assert [int(code) for code, *_ in rows] == sorted(ExitCode)
    assert all(cure for *_, cure in rows)


def test_every_code_has_a_meaning_and_every_error_a_section() -> None:
    assert set(MEANING) == set(ExitCode)
    sections = {int(code) for code in re.findall(r"^## (\d+): ", ERRORS, re.MULTILINE)}
    assert sections == set(BY_CODE) == set(ExitCode) - {ExitCode.DONE}
