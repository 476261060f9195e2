"""`hpcpipe bench` on ranks, with real messages."""

import json
import signal
from pathlib import Path

import pytest
from support.commands import Command, run, wait_until

from hpcpipe.errors import ExitCode
from hpcpipe.schedule.build import build

SHORT = ("--repetitions", 2, "--microbatches", 4)
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.toml"
COMPILE_LIMIT_S = 400.0
TINY = """
[model]
layers = 3
width = 32
heads = 2
context = 24
[parallel]
microbatches = 4
microbatch_size = 2
"""


def test_ranks_measure_together_and_one_speaks(tmp_path: Path) -> None:
    finished = run(["launch", "-n", 2, "bench", "actions", *SHORT, "--json"], tmp_path / "output", limit_s=60)
    assert finished.code == ExitCode.DONE, finished.stderr
    assert finished.stderr == ""
    found = json.loads(finished.stdout)
    assert (found["transport"], found["ranks"]) == ("mpi", 2)
    for row in found["schedules"]:
        schedule = build(row["schedule"], 2, 4)
        assert row["actions"] == sum(map(len, schedule.actions))
        assert row["action_us"] > 0
        assert {"RECV_F", "SEND_B", "poll"} <= set(row["kinds"])


def test_the_table_is_plain_where_no_terminal_shows_it(tmp_path: Path) -> None:
    words = ["launch", "-n", 2, "bench", "actions", *SHORT, "--schedule", "gpipe"]
    finished = run(words, tmp_path / "output", limit_s=60)
    assert finished.code == ExitCode.DONE
    assert "with MPI messages" in finished.stdout and "\x1b" not in finished.stdout


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a configuration that names no data; the kernels are compiled when it is returned."""
    path = tmp_path_factory.mktemp("bench") / "tiny.toml"
    path.write_text(TINY)
    finished = run(["bench", "step", path, "--steps", 1], path.parent / "output", limit_s=COMPILE_LIMIT_S)
    assert finished.code == ExitCode.DONE, finished.stderr
    return path


def test_steps_are_run_on_ranks_and_their_time_is_shared_out(tmp_path: Path, tiny: Path) -> None:
    words = ["launch", "-n", 2, "bench", "step", tiny, "--steps", 2, "--set", f"run.dir={tmp_path / 'runs'}", "--json"]
    finished = run(words, tmp_path / "output")
    assert finished.code == ExitCode.DONE, finished.stderr
    assert finished.stderr == ""
    found = json.loads(finished.stdout)
    assert (found["benchmark"], found["ranks"], found["pipeline"], found["data"]) == ("step", 2, 2, 1)
    assert (found["schedule"], found["steps"], found["tokens_per_step"]) == ("1f1b", 2, 4 * 2 * 24)
    assert found["tokens_per_s"] == pytest.approx(found["tokens_per_step"] / found["step_s"])
    assert found["step_p10_s"] <= found["step_s"] <= found["step_p90_s"]
    assert 0 < found["mfu"] < 1 and 0 < found["bubble"] < 1
    assert found["peak_flops"] > 0 and found["copy_bytes_per_s"] > 0 and found["predicted_step_s"] > 0
    assert found["waiting"] > 0 and found["scheduled_waiting"] > 0 and found["exposed_messages"] >= 0
    kernels = {row["name"]: row for row in found["kernels"]}
    # Both halves of the model, and what comes at the end of a step.
    assert {"embedding_forward", "add_into", "block_sums_of_squares", "adamw_update"} < set(kernels)
    assert any(name.startswith("cross_entropy") for name in kernels)
    assert kernels["embedding_forward"]["calls"] == 4
    whole = sum(row["seconds"] for row in found["kernels"]) + found["waiting_s"] + found["other_s"]
    assert whole == pytest.approx(found["observed_step_s"]) and found["other_s"] > 0
    assert not (tmp_path / "runs").exists()


def test_steps_of_replicas_print_a_table(tmp_path: Path, tiny: Path) -> None:
    words = ["launch", "-n", 2, "bench", "step", tiny, "--steps", 1, "--set", "parallel.data=2"]
    finished = run(words, tmp_path / "output")
    assert finished.code == ExitCode.DONE, finished.stderr
    assert "2 ranks = pipeline of 1 x 2" in finished.stdout and "MFU" in finished.stdout
    rows = [line.split("  ")[0] for line in finished.stdout.splitlines()]
    assert {"kernel", "waiting for messages", "everything else", "a step on all ranks"} < set(rows)


def test_messages_of_all_sizes_are_measured_both_ways(tmp_path: Path, tiny: Path) -> None:
    words = ["launch", "-n", 3, "bench", "p2p", tiny, "--sizes", "100,64KiB,4MiB", "--json"]
    finished = run(words, tmp_path / "output", limit_s=60)
    assert finished.code == ExitCode.DONE, finished.stderr
    found = json.loads(finished.stdout)
    assert (found["benchmark"], found["ranks"], found["pairs"]) == ("p2p", 3, 1)
    stream = 4 * 2 * 24 * 32
    assert [row["bytes"] for row in found["sizes"]] == [100, stream, 64 << 10, 4 << 20]
    for row in found["sizes"]:
        assert row["is_stream"] == (row["bytes"] == stream)
        assert 0 < row["p10_s"] <= row["one_way_s"] <= row["p90_s"]
        assert 0 < row["both_ways_p10_s"] <= row["both_ways_s"] <= row["both_ways_p90_s"]
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["one_way_s"])
        assert row["both_ways_bytes_per_s"] == pytest.approx(2 * row["bytes"] / row["both_ways_s"])


def test_the_table_of_messages_names_the_residual_stream(tmp_path: Path, tiny: Path) -> None:
    words = ["launch", "-n", 2, "bench", "p2p", tiny, "--sizes", "1KiB", "--set", "model.width=16"]
    finished = run(words, tmp_path / "output", limit_s=60)
    assert finished.code == ExitCode.DONE, finished.stderr
    lines = finished.stdout.splitlines()
    assert any(line.split()[0] == "3,072" and line.endswith("residual stream") for line in lines if line)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["actions", "--ranks", 3], "--ranks 3, but 2 ranks were started"),
        (["actions", "--repetitions", 0], "at least 1"),
        (["actions", "--sched", "gpipe"], "--schedule"),
        (["step", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["step", QUICKSTART, "--set", "parallel.pipeline=3"], "parallel.pipeline = 3"),
        (["p2p", "--sizes", "0"], "messages have at least 1 byte"),
        (["gemm"], "it measures one process; run `hpcpipe bench gemm` by itself"),
    ],
)
def test_a_mistake_is_told_once(tmp_path: Path, words: list[object], told: str) -> None:
    finished = run(["launch", "-n", 2, "bench", *words], tmp_path / "output", limit_s=60)
    assert finished.code == ExitCode.USAGE
    assert len(finished.messages) == 1 and told in finished.messages[0]
    assert finished.stdout == ""


@pytest.mark.parametrize(("launcher", "code"), [(("launch", "-n", 2), ExitCode.STOPPED), ((), -signal.SIGINT)])
def test_an_interrupted_benchmark_of_checkpoints_leaves_no_files(
    tmp_path: Path, tiny: Path, launcher: tuple[object, ...], code: int
) -> None:
    root = tmp_path / "runs"
    words = [*launcher, "bench", "checkpoint", tiny, "--set", f"run.dir={root}"]
    command = Command(words, tmp_path / "output", {"HPCPIPE_TEST_DISK": "slow=1e5"})
    try:
        wait_until(lambda: bool(list(root.glob("*/checkpoints/*/rank-*"))), "a checkpoint", command)
        command.process.send_signal(signal.SIGINT)
        finished = command.wait(20)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == code
    assert "Traceback" not in finished.stderr
    assert list(root.iterdir()) == []


def test_a_benchmark_of_checkpoints_on_a_disk_that_cannot_be_read_says_so(tmp_path: Path, tiny: Path) -> None:
    root = tmp_path / "runs"
    words = ["launch", "-n", 2, "bench", "checkpoint", tiny, "--set", f"run.dir={root}"]
    finished = run(words, tmp_path / "output", {"HPCPIPE_TEST_DISK": "fail=read:EIO"})
    assert finished.code == ExitCode.DISK, finished.stderr
    assert "what was written there could not be read back" in finished.stderr
    assert list(root.iterdir()) == []
