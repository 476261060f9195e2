"""Starts ``tests/mpi`` on several numbers of ranks; see conftest.py for how tests are selected."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.ranks import MESSAGES, RANK_ARGUMENTS, run_on_ranks

MPI_TESTS = str(Path(__file__).parent / "mpi")


def run(num_ranks: int, arguments: Sequence[str], directory: Path) -> None:
    # Where every message is late, so is every test.
    limits = {"limit_s": 3600.0, "test_limit_s": 900.0} if os.environ.get(MESSAGES) else {"limit_s": 1200.0}
    job = run_on_ranks(num_ranks, arguments, directory, **limits)
    print(job.summary())
    if job.is_empty:
        pytest.skip("no test over ranks is selected")
    problem = job.problem()
    if problem:
        pytest.fail(problem, pytrace=False)


@pytest.mark.timeout(3700)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_on_ranks(num_ranks: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run(num_ranks, request.config.stash[RANK_ARGUMENTS], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3700)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_with_synchronous_sends_and_late_messages(
    num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MESSAGES, "synchronous,delay=0.05")
    run(num_ranks, [MPI_TESTS], tmp_path)
