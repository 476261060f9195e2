"""Disks that are slow, full or broken: training goes on, the last good checkpoint stands, and everybody is told."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import Finished, bits, events, status, step_rows, wait_until
from support.runs import Runs

DISK = "HPCPIPE_TEST_DISK"
SLOW_STEPS = {"HPCPIPE_TEST_MESSAGES": "delay=0.01"}


def checkpoints(directory: Path) -> list[int]:
    """Return the steps of the committed checkpoints."""
    return sorted(int(path.name[5:]) for path in directory.glob("checkpoints/step-????????"))


def training_bits(directory: Path) -> list[tuple[str, ...]]:
    """Return the rows of training steps: a run that was made to end early has an evaluation more."""
    return [row for row in bits(directory) if row[1].startswith("loss ")]


def assert_all_sound(runs: Runs, directory: Path) -> None:
    finished = runs.hpcpipe("checkpoint", "verify", directory, "--json")
    assert finished.code == 0, finished.stdout
    assert json.loads(finished.stdout)["ok"]


def assert_failed_with_74(finished: Finished, directory: Path, problem: str) -> None:
    assert finished.code == 74, finished.stderr
    assert problem in finished.stderr
    assert finished.stderr.count("hpcpipe: error: ") == 1
    assert (status(directory)["state"], status(directory)["exit_code"]) == ("failed", 74)


def test_a_slow_disk_skips_checkpoints_and_says_so(runs: Runs, finished_run: Path) -> None:
    settings = ("checkpoint.every=2", "checkpoint.keep=0", "checkpoint.when_busy=skip")
    # Of about 100 kB per rank, so that writing takes longer than some steps.
    finished = runs.train("run", 2, *settings, environ={DISK: "slow=3e5"})
    directory = runs.directory("run")
    assert finished.code == 0, finished.stderr
    skipped = [event["step"] for event in events(directory, "checkpoint skipped")]
    written = [event["step"] for event in events(directory, "checkpoint")]
    assert skipped
    assert sorted(skipped + written) == [*range(2, 21, 2)]
    assert written[-1] == 20
    assert checkpoints(directory) == written
    assert finished.stdout.count("skipped: that of step") == len(skipped)
    assert bits(directory) == bits(finished_run)
    assert_all_sound(runs, directory)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("fail=reserve:ENOSPC:1", "No space left on device"),
        ("fail=write:EDQUOT:1", "your quota there is used up"),
        ("fail=sync:EIO:1", "the device or the server failed"),
        ("fail=rename:EROFS:1", "the file system is mounted read-only"),
    ],
)
def test_training_goes_on_after_a_failed_checkpoint(runs: Runs, finished_run: Path, trouble: str, words: str) -> None:
    finished = runs.train("run", 2, "checkpoint.every=5", "checkpoint.keep=0", environ={DISK: trouble})
    directory = runs.directory("run")
    assert finished.code == 0, finished.stderr
    (failed,) = events(directory, "checkpoint failed")
    assert failed["step"] == 5
    assert words in failed["problem"]
    assert f"checkpoint of step 5 failed (1 in a row): {failed['problem']}" in finished.stdout
    assert checkpoints(directory) == [10, 15, 20]
    written = re.findall(
        r"^checkpoint of step (\d+) written in [\d.]+ s; training waited \d+ ms$", finished.stdout, re.M
    )
    assert written == ["10", "15", "20"]
    assert not list(directory.glob("checkpoints/*partial"))
    assert bits(directory) == bits(finished_run)
    assert_all_sound(runs, directory)


def test_failures_in_a_row_end_the_run_and_the_last_good_checkpoint_stands(runs: Runs, finished_run: Path) -> None:
    runs.train_well("run", 2, "train.steps=4", "train.decay_steps=20")
    directory = runs.directory("run")
    settings = ("checkpoint.every=3", "checkpoint.max_failures=2")
    finished = runs.train("run", 2, *settings, environ={DISK: "fail=sync:EIO"})
    assert_failed_with_74(
        finished, directory, "2 checkpoints in a row failed (checkpoint.max_failures), the last with:"
    )
    assert [event["step"] for event in events(directory, "checkpoint failed")] == [6, 9]
    assert checkpoints(directory) == [4]
    assert_all_sound(runs, directory)
    runs.train_well("run", 3)
    assert events(directory, "resumed")[-1]["step"] == 4
    assert training_bits(directory) == training_bits(finished_run)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(runs: Runs) -> None:
    finished = runs.train("run", 2, "checkpoint.every=0", environ={DISK: "fail=write:ENOSPC"})
    assert_failed_with_74(finished, runs.directory("run"), "the last checkpoint, of step 20, could not be written:")


def test_a_stop_that_meets_a_full_disk_says_what_is_lost(runs: Runs) -> None:
    command = runs.start("run", 2, "checkpoint.every=0", environ={DISK: "fail=write:ENOSPC", **SLOW_STEPS})
    directory = runs.directory("run")
    try:
        wait_until(lambda: len(step_rows(directory)) >= 2, "2 rows", command)
        command.process.send_signal(signal.SIGTERM)
        finished = command.wait(20)
    finally:
        command.kill()
    assert_failed_with_74(finished, directory, "No space left on device")


def test_a_killed_writer_costs_one_checkpoint(runs: Runs, finished_run: Path) -> None:
    settings = ("checkpoint.every=5", "checkpoint.keep=0", "checkpoint.when_busy=skip")
    command = runs.start("run", 2, *settings, environ={DISK: "slow=5e5", **SLOW_STEPS})
    directory = runs.directory("run")
    try:
        wait_until(lambda: bool(list(directory.glob("checkpoints/*.partial/rank-*"))), "a checkpoint", command)
        for pid, words in command.processes().items():
            if "hpcpipe.checkpoint.writer" in words:
                os.kill(pid, signal.SIGKILL)
        finished = command.wait(60)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 0, finished.stderr
    (failed,) = events(directory, "checkpoint failed")
    assert "was ended by signal 9" in failed["problem"]
    assert checkpoints(directory)[-1] == 20
    assert bits(directory) == bits(finished_run)
    assert_all_sound(runs, directory)


def test_a_checkpoint_that_the_disk_has_altered_is_withdrawn(runs: Runs, finished_run: Path) -> None:
    """Between the commit and the reading back, somebody alters a file."""
    settings = ("checkpoint.every=10", "checkpoint.keep=0")
    command = runs.start("run", 2, *settings, environ={DISK: "slow=5e5", **SLOW_STEPS})
    directory = runs.directory("run")
    file = directory / "checkpoints/step-00000010/rank-0001.h5"
    try:
        wait_until(file.exists, "the checkpoint of step 10", command)
        with file.open("r+b") as stream:
            stream.seek(-5, os.SEEK_END)
            stream.write(b"?")
        finished = command.wait(60)
    finally:
        command.kill()
    assert finished.code == 0, finished.stderr
    (failed,) = events(directory, "checkpoint failed")
    assert "rank-0001.h5: was altered after it was written" in failed["problem"]
    assert checkpoints(directory) == [20]
    assert bits(directory) == bits(finished_run)


def test_ranks_wait_for_a_slow_writer_longer_than_for_a_rank(runs: Runs, finished_run: Path) -> None:
    settings = ("checkpoint.every=5", "checkpoint.when_busy=wait", "parallel.timeout_s=3")
    command = runs.start("run", 2, *settings, environ={DISK: "slow=5e5"})
    directory = runs.directory("run")
    try:
        wait_until(lambda: bool(list(directory.glob("checkpoints/*.partial/rank-*"))), "a checkpoint", command)
        writer = next(pid for pid, words in command.processes().items() if "hpcpipe.checkpoint.writer" in words)
        os.kill(writer, signal.SIGSTOP)
        time.sleep(6)
        os.kill(writer, signal.SIGCONT)
        finished = command.wait(60)
    finally:
        command.kill()
    assert finished.code == 0, finished.stderr
    assert [event["step"] for event in events(directory, "checkpoint")] == [5, 10, 15, 20]
    assert bits(directory) == bits(finished_run)


def test_a_last_checkpoint_that_cannot_be_read_back_is_taken_again(runs: Runs, finished_run: Path) -> None:
    finished = runs.train("run", 2, "checkpoint.every=10", environ={DISK: "fail=read:EIO:2"})
    directory = runs.directory("run")
    assert finished.code == 0, finished.stderr
    assert [event["step"] for event in events(directory, "checkpoint failed")] == [20]
    assert [event["step"] for event in events(directory, "checkpoint")] == [10, 20, 20]
    assert checkpoints(directory) == [10, 20]
    assert bits(directory) == bits(finished_run)
    assert_all_sound(runs, directory)


def test_a_last_checkpoint_that_can_never_be_read_back_is_an_error(runs: Runs) -> None:
    finished = runs.train("run", 2, "checkpoint.every=10", environ={DISK: "fail=read:EIO:2-9"})
    directory = runs.directory("run")
    assert_failed_with_74(finished, directory, "the last checkpoint, of step 20, could not be written:")
    assert checkpoints(directory) == [10]


def test_checkpoints_that_cannot_be_read_back_are_failures_in_a_row(runs: Runs) -> None:
    settings = ("checkpoint.every=5", "checkpoint.max_failures=2")
    finished = runs.train("run", 2, *settings, environ={DISK: "fail=read:EIO"})
    directory = runs.directory("run")
    assert_failed_with_74(
        finished, directory, "2 checkpoints in a row failed (checkpoint.max_failures), the last with:"
    )
    assert [event["step"] for event in events(directory, "checkpoint failed")] == [5, 10]


def test_the_end_waits_until_old_checkpoints_are_removed(runs: Runs) -> None:
    """The third name that rank 0's writer changes is that of step 10, which then is not to be kept."""
    finished = runs.train("run", 2, "checkpoint.keep=1", environ={DISK: "fail=rename:EIO:3"})
    directory = runs.directory("run")
    assert finished.code == 0, finished.stderr
    (failed,) = events(directory, "checkpoint clean-up failed")
    assert "Input/output error" in failed["problem"] and failed["problem"] in finished.stdout
    assert checkpoints(directory) == [10, 20]


@contextlib.contextmanager
def small_file_system(path: Path, size: str) -> Iterator[Path]:
    """Mount a file system in memory; the test is skipped where that is not allowed."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_file_system_that_fills_up(runs: Runs, finished_run: Path, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "4m") as small:
        directory = runs.directory("run")
        directory.mkdir(parents=True)
        (directory / "checkpoints").symlink_to(small, target_is_directory=True)
        filling = small / "filling"
        runs.train_well("run", 2, "train.steps=4", "train.decay_steps=20")
        left = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
        filling.write_bytes(bytes(left - 200_000))
        finished = runs.train("run", 2, "checkpoint.every=5", "checkpoint.max_failures=2")
        assert_failed_with_74(finished, directory, "No space left on device")
        assert checkpoints(directory) == [4]
        assert_all_sound(runs, directory)
        filling.unlink()
        runs.train_well("run", 2, "checkpoint.keep=1")
        assert training_bits(directory) == training_bits(finished_run)
        assert checkpoints(directory) == [20]
