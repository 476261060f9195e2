"""The jobs over ranks themselves: what is said when an SPMD test fails, hangs or crashes, and that nothing is left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.ranks import MESSAGES, TESTS, Job, run_on_ranks, session_members

HEAD = "import os, signal, sys, time\nimport pytest\nfrom mpi4py import MPI\ncomm = MPI.COMM_WORLD\n"
PIDS = "\ndef test_note_the_session():\n    open(f'session-{comm.rank}', 'w').write(str(os.getsid(0)))\n"


@pytest.fixture
def run(tmp_path):
    """Run a test file on ranks in a root directory of its own, and check that no process is left."""

    def run_text(text: str, num_ranks: int = 3, **limits: float) -> Job:
        root, reports = tmp_path / "root", tmp_path / "reports"
        root.mkdir()
        reports.mkdir()
        (root / "pytest.ini").write_text("[pytest]\n")
        (root / "test_made_up.py").write_text(HEAD + PIDS + text)
        job = run_on_ranks(num_ranks, ["test_made_up.py"], reports, working_directory=root, **limits)
        sessions = {path.read_text() for path in root.glob("session-*")}
        assert len(sessions) == 1
        assert session_members(int(sessions.pop())) == []
        return job

    return run_text


def test_a_passing_job_has_no_problem(run):
    job = run("def test_sum():\n    assert comm.allreduce(1) == 3\n")
    assert job.problem() is None
    assert not job.is_empty
    assert job.summary().startswith("3 ranks: 2 passed in ")


def test_one_failing_rank_ends_the_job_and_shows_its_traceback(run):
    job = run(
        "def test_alone():\n"
        "    if comm.rank == 1:\n"
        "        print('the words of rank 1')\n"
        "        assert 6 * 7 == 41, 'wrong on purpose'\n"
        "    comm.recv(source=1)\n",
        test_limit_s=60,
    )
    problem = job.problem()
    assert job.elapsed_s < 30
    assert job.returncode != 0
    assert problem.startswith("rank 1 of 3 failed first: test_made_up.py::test_alone (call)\n")
    assert "assert 6 * 7 == 41, 'wrong on purpose'" in problem
    assert "AssertionError: wrong on purpose" in problem
    assert "the words of rank 1" in problem
    assert "rank 0 failed" not in problem


def test_the_first_of_several_failures_is_shown_in_full(run):
    job = run(
        "def test_all():\n    time.sleep(0.3 * ((comm.rank + 1) % 3))\n    assert comm.rank < 0, 'rank too high'\n"
    )
    problem = job.problem()
    assert problem.startswith("rank 2 of 3 failed first")
    assert problem.count("assert comm.rank < 0") == 1
    assert "\nrank 0 failed 0." in problem


def test_a_failing_teardown_is_a_failure(run):
    job = run(
        "@pytest.fixture\ndef fragile():\n    yield\n    assert comm.rank != 2, 'left open'\n"
        "def test_fragile(fragile):\n    pass\n"
        "def test_next():\n    comm.Barrier()\n"
    )
    assert "rank 2 of 3 failed first: test_made_up.py::test_fragile (teardown)" in job.problem()


def test_a_hang_is_reported_with_the_stacks(run):
    job = run("def test_waiting():\n    if comm.rank == 0:\n        comm.recv(source=1)\n", test_limit_s=4)
    problem = job.problem()
    assert "no rank reported a failed test" in problem
    assert "rank 0 was in test_made_up.py::test_waiting" in problem
    assert "in test_waiting" in problem


def test_a_job_that_ignores_its_end_is_killed(run):
    started = time.monotonic()
    job = run(
        "def test_deaf():\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    os.setpgid(0, 0)\n"
        "    while True:\n        pass\n",
        num_ranks=2,
        limit_s=6,
    )
    assert job.returncode is None
    assert "was ended at its time limit" in job.problem()
    assert "was in test_made_up.py::test_deaf" in job.problem()
    assert time.monotonic() - started < 40


def test_a_killed_rank_is_a_problem(run):
    job = run(
        "def test_dying():\n    if comm.rank == 1:\n        os.kill(os.getpid(), signal.SIGKILL)\n    comm.Barrier()\n"
    )
    assert "no rank reported a failed test" in job.problem()
    assert "rank 1 was in test_made_up.py::test_dying" in job.problem()


def test_a_crash_shows_where_it_happened(run):
    job = run(
        "def test_crashing():\n    if comm.rank == 1:\n        import ctypes\n        ctypes.string_at(0)\n"
        "    comm.Barrier()\n"
    )
    assert "Segmentation fault" in job.problem()
    assert "in test_crashing" in job.problem()


def test_a_file_that_one_rank_cannot_import_is_a_problem(run):
    job = run("if comm.rank == 2:\n    time.sleep(0.5)\n    raise ImportError('no such thing')\n")
    # The other ranks got as far as the first test, which nothing keeps from ending.
    assert "rank 2 of 3 failed first: test_made_up.py (collection)" in job.problem()
    assert "no such thing" in job.problem()


def test_ranks_must_run_the_same_tests(run):
    job = run("if comm.rank == 0:\n    def test_more():\n        pass\n")
    assert "ran other tests than rank 0" in job.problem()
    assert "test_more" in job.problem()


def collect(*arguments: str, directory: Path = TESTS.parent) -> str:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMPI_")}
    result = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    return result.stdout


def test_a_path_below_mpi_becomes_jobs():
    assert collect("tests/mpi/test_comm.py").count("test_ranks.py::test_on_ranks[") == 4
    assert collect("test_comm.py::test_the_communicator_is_a_duplicate", directory=TESTS / "mpi").count("[8]") == 1


def test_keywords_select_inside_the_jobs():
    arguments = ["tests/test_ranks.py", "tests/test_rank_plumbing.py"]
    assert "test_on_ranks[3]" in collect(*arguments, "-k", "ring_passes and 4097")
    assert "test_on_ranks[3]" in collect(*arguments, "-k", "test_on_ranks")
    assert "test_on_ranks[3]" not in collect(*arguments, "-k", "a_killed_rank")


def test_a_plain_pytest_never_starts_mpi():
    code = (
        "import sys, pytest\n"
        "assert pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests']) == 0\n"
        "MPI = sys.modules.get('mpi4py.MPI')\n"
        "assert MPI is None or not MPI.Is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, check=True, timeout=120, capture_output=True)


EARLY = """
import numpy as np
def test_a_buffer_is_changed_before_its_message_has_left():
    if comm.rank == 0:
        buffer = np.ones(100, np.float32)
        request = comm.Isend(buffer, 1, 1)
        buffer[:] = 2
        comm.Barrier()
        request.Wait()
    else:
        comm.Barrier()
        received = np.zeros(100, np.float32)
        comm.Recv(received, 0, 1)
        assert (received == 1).all(), f'received {received[0]}'
"""


def test_hard_messages_show_a_buffer_that_is_used_again_too_early(run, monkeypatch):
    monkeypatch.setenv(MESSAGES, "synchronous")
    assert "received 2.0" in run(EARLY, 2).problem()
