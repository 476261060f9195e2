"""The fault matrix, once: the rows that between them try every kind of recovery here, the others with ``-m chaos``."""

from pathlib import Path

import pytest

from hpcpipe.chaos.row import Row
from hpcpipe.chaos.rows import ROWS
from hpcpipe.chaos.runner import Runner
from hpcpipe.chaos.setting import Setting

# Hangs, numbers, signals and runs without recovery have tests of their own.
_QUICK = "1 3 6 7 9 9.all 10.restore 12 33.moment"
QUICK = _QUICK.split()


def parameter(row: Row) -> object:
    marks = [pytest.mark.chaos] + ([] if row.name in QUICK else [pytest.mark.slow])
    return pytest.param(row, id=row.name, marks=marks)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    setting = Setting(tmp_path_factory.mktemp("chaos"))
    setting.make()
    return Runner(setting)


@pytest.mark.parametrize("row", [parameter(row) for row in ROWS if not row.is_slow])
def test_row(row: Row, runner: Runner) -> None:
    result = runner.run(row, 0)
    output = runner.setting.root / "output" / f"row-{row.name}-0"
    told = "".join((output / name).read_text(errors="replace")[-4000:] for name in ("stdout", "stderr"))
    assert not result.problems, "\n".join([result.seen, *result.problems, told])


def test_every_quick_row_is_there() -> None:
    assert set(QUICK) <= {row.name for row in ROWS}


def test_a_run_that_does_not_recover_is_seen(runner: Runner, tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.name == "1")
    result = runner.run(Row(row.name, row.fault, row.when, row.expected, row.inject, options=("--recovery", "off")), 0)
    assert "exit code 71, not 0" in result.problems
    assert any("events 'recovered'" in problem for problem in result.problems)
