"""`hpcpipe launch` with real ranks: signals, exit codes, one message, and nothing left behind."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcpipe.kernels import warm
from hpcpipe.kernels.features import family, has_bf16_unit

NUM_RANKS = 2
MINIATURE = Path(__file__).parents[1] / "support" / "miniature_run.py"
# The command's own way of telling errors, with another program than `hpcpipe train`.
STARTER = """
import sys
from pathlib import Path
from hpcpipe.cli import doctor, main
from hpcpipe.cli.launch import launch
number, recovery, *program = sys.argv[1:]
doctor.run = lambda _: launch([sys.executable, *program], int(number), Path(program[1]), recovery=recovery)
sys.exit(main.main(["doctor"]))
"""

Start = Callable[..., subprocess.Popen[bytes]]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} has not happened within {limit_s:.0f} s"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a miniature run; afterwards no process of it may be left."""
    started: list[subprocess.Popen[bytes]] = []

    def start_run(behaviour: str, stdout: int = subprocess.PIPE, recovery: str = "off") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", STARTER, str(NUM_RANKS), recovery, str(MINIATURE), str(tmp_path), behaviour]
        started.append(subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL))
        return started[-1]

    yield start_run
    for process in started:
        process.kill()
        process.communicate(timeout=10)
    for pid in pids(tmp_path):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def pids(directory: Path) -> list[int]:
    return [int(path.read_text()) for path in directory.glob("pid-?")]


def wait_for_ranks(directory: Path) -> list[int]:
    wait_until(lambda: len(pids(directory)) == NUM_RANKS, "the start of the ranks")
    return pids(directory)


def assert_all_gone(directory: Path, limit_s: float = 5.0) -> None:
    wait_until(lambda: not any(map(is_alive, pids(directory))), "the end of the ranks", limit_s)


def test_a_run_that_is_done(start: Start) -> None:
    process = start("done")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"partial" * NUM_RANKS)
    assert out.count(b"terminal None\n") == NUM_RANKS


def test_ranks_learn_of_the_terminal(start: Start) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "97", "rows", "31"], stdin=theirs, check=True)
    process = start("done", stdout=theirs)
    process.communicate(timeout=30)
    os.close(theirs)
    shown = os.read(ours, 4096)
    os.close(ours)
    assert process.returncode == 0
    assert b"terminal 97x31" in shown


def test_a_failed_run_says_one_thing(start: Start) -> None:
    process = start("damaged")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 65
    assert err == b"hpcpipe: error: tokens.h5: truncated\n"


def test_status_of_another_launch_does_not_count(start: Start, tmp_path: Path) -> None:
    other = json.dumps({"state": "done", "exit_code": 0, "launch_id": "another"})
    (tmp_path / "status.json").write_text(other)
    process = start("in-use")
    process.communicate(timeout=30)
    assert process.returncode == 73
    assert (tmp_path / "status.json").read_text() == other


def test_ranks_that_end_without_a_word(start: Start) -> None:
    process = start("silent")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 71
    assert err.startswith(b"hpcpipe: error: mpirun ended with code 0 before the run was done")


def test_a_killed_rank_is_named_once(start: Start, tmp_path: Path) -> None:
    process = start("wait")
    wait_for_ranks(tmp_path)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 71
    assert err.count(b"\n") == 1
    assert b"rank 1 on " in err
    assert b"was ended by signal 9 (Killed)" in err
    assert_all_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_reaches_every_rank_as_sigusr1(number: signal.Signals, start: Start, tmp_path: Path) -> None:
    process = start("wait")
    wait_for_ranks(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (75, b"")
    assert [(tmp_path / f"signal-{rank}").read_text() for rank in range(NUM_RANKS)] == ["SIGUSR1"] * NUM_RANKS
    assert_all_gone(tmp_path)


def test_a_stop_before_the_run_has_begun(start: Start, tmp_path: Path) -> None:
    process = start("starting")
    wait_for_ranks(tmp_path)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err == b"hpcpipe: stopped: asked to stop before the first step; run the same command again\n"
    assert_all_gone(tmp_path)


@pytest.mark.parametrize("numbers", [[signal.SIGINT] * 3, [signal.SIGQUIT]])
def test_everything_is_killed_at_once(numbers: list[signal.Signals], start: Start, tmp_path: Path) -> None:
    process = start("deaf")
    wait_for_ranks(tmp_path)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    process.communicate(timeout=5)
    assert process.returncode == 75
    assert_all_gone(tmp_path, limit_s=1.0)


def test_nothing_outlives_a_killed_launch(start: Start, tmp_path: Path) -> None:
    process = start("deaf")
    wait_for_ranks(tmp_path)
    process.kill()
    process.wait(timeout=5)
    assert_all_gone(tmp_path)


def test_nothing_outlives_a_killed_mpirun(start: Start, tmp_path: Path) -> None:
    process = start("deaf")
    ranks = wait_for_ranks(tmp_path)
    parent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    process.communicate(timeout=10)
    assert process.returncode == 71
    assert_all_gone(tmp_path)


def test_ranks_that_do_not_end_after_the_run_has(start: Start, tmp_path: Path) -> None:
    process = start("late")
    wait_for_ranks(tmp_path)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=25)
    assert process.returncode == 75
    assert 14 < time.monotonic() - began < 20
    assert_all_gone(tmp_path)


def test_a_killed_rank_is_no_word_where_the_others_go_on(start: Start, tmp_path: Path) -> None:
    process = start("one-dies", recovery="on")
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert_all_gone(tmp_path)


def test_the_code_of_mpirun_is_not_believed_where_all_are_killed(start: Start, tmp_path: Path) -> None:
    process = start("all-die", recovery="on")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 71
    assert err.startswith(b"hpcpipe: error: mpirun ended with code 0 before the run was done; run the same command")
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 71


def test_what_hangs_after_the_end_is_killed_soon_where_ranks_survive_each_other(start: Start, tmp_path: Path) -> None:
    process = start("hangs-at-end", recovery="on")
    wait_for_ranks(tmp_path)
    began = time.monotonic()
    _, err = process.communicate(timeout=25)
    assert (process.returncode, err) == (0, b"")
    assert 2.5 < time.monotonic() - began < 8
    assert_all_gone(tmp_path)


def test_wrong_configuration_is_told_once_with_its_code(tmp_path: Path) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text(f'[run]\ndir = "{tmp_path}"\nname = "one"\n[train]\nstep = 3\n')
    command = [sys.executable, "-m", "hpcpipe", "launch", "-n", "2", "train", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 64
    assert result.stderr.count("hpcpipe: error:") == 1
    assert "did you mean train.steps?" in result.stderr
    assert "prterun" not in result.stderr
    assert json.loads((tmp_path / "one/status.json").read_text())["exit_code"] == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--spares", "1", "bench", "p2p"], "--spares 1: only `train` goes on when a rank fails"),
        (["--recovery", "on", "bench", "p2p"], "--recovery on: only `train` goes on when a rank fails"),
        (["--spares", "-1", "train", "x.toml"], "--spares -1: the number of spare ranks must be at least 0"),
        (["--spares", "1", "--recovery", "off", "train", "x.toml"], "spare ranks have nothing to do"),
        (["--recovery", "on", "--mpirun-arg=--mca", "--mpirun-arg=pml", "--mpirun-arg=ucx", "train", "x.toml"], "ucx"),
    ],
)
def test_recovery_that_cannot_be(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("")
    command = [sys.executable, "-m", "hpcpipe", "launch", "-n", "2", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 64
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.toml"]


def test_options_that_mpirun_refuses(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("")
    command = [sys.executable, "-m", "hpcpipe", "launch", "-n", "1", "--mpirun-arg=--no-such-option", "train", "x.toml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 64
    assert "--no-such-option" in result.stderr
    assert "hpcpipe: error: mpirun could not start the ranks" in result.stderr


def test_doctor_tries_two_ranks() -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-m", "hpcpipe", "doctor", "--json"], capture_output=True, text=True, timeout=60
    )
    report = json.loads(result.stdout)
    assert (result.returncode, report["problems"]) == (0, [])
    assert report["mpi"]["works"] is True
    assert "Open MPI" in report["mpi"]["library"]
    assert {"mpi", "cores", "features", "slurm", "recovery"} <= set(report)
    assert report["recovery"]["works"] is True
    assert report["mpi"]["threads"] >= 1
    assert f"2 ranks with {report['mpi']['threads']} thread" in report["mpi"]["cores"]
    kernels = report["kernels"]
    assert kernels["family"] == family()
    assert kernels["precision"] == ("bf16" if has_bf16_unit() else "f32")
    assert kernels["description"] == warm.describe(kernels["precision"])
    assert kernels["compiled"] is warm.is_compiled(kernels["precision"])
