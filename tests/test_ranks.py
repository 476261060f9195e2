"""Starts ``tests/mpi`` on several numbers of ranks; see conftest.py for how tests are selected."""

import pytest
from support.ranks import RANK_ARGUMENTS, run_on_ranks


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_on_ranks(num_ranks: int, request: pytest.FixtureRequest, tmp_path) -> None:
    job = run_on_ranks(num_ranks, request.config.stash[RANK_ARGUMENTS], tmp_path)
    print(job.summary())
    if job.is_empty:
        pytest.skip("no test over ranks is selected")
    problem = job.problem()
    if problem:
        pytest.fail(problem, pytrace=False)
