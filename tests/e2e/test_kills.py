"""Processes that are killed without a warning: the next start finds a sound checkpoint and loses no bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.commands import bits, events, rows, status, step_rows, wait_until
from support.runs import Runs

SLOW_STEPS = {"HPCPIPE_TEST_MESSAGES": "delay=0.01"}
EVERY = 2


def last_step(directory: Path) -> int:
    """Return the step of the last whole row, while another process may be writing or replacing the file."""
    return max((row["step"] for row in step_rows(directory)), default=0)


def assert_newest_is_sound(runs: Runs, directory: Path) -> int:
    """Verify all checkpoints as a user does; return the newest step, 0 if there is none yet."""
    root = directory / "checkpoints"
    steps = [int(path.name.removeprefix("step-")) for path in root.glob("step-????????")]
    if not steps:
        return 0
    finished = runs.hpcpipe("checkpoint", "verify", directory, "--json")
    assert finished.code == 0, finished.stdout
    report = json.loads(finished.stdout)
    assert report["ok"]
    assert Path(report["newest_good"]).name == f"step-{max(steps):08d}"
    return max(steps)


def kill_and_restart(runs: Runs, num_kills: int, num_steps: int, seed: int) -> None:
    numbers = random.Random(seed)
    settings = (f"train.steps={num_steps}", f"train.decay_steps={num_steps}", f"checkpoint.every={EVERY}")
    whole = runs.train_well("whole", 2, *settings)
    directory = runs.directory("run")
    resumed_from = []
    for number in range(num_kills):
        command = runs.start("run", numbers.choice([1, 2, 3]), *settings, environ=SLOW_STEPS)
        before = last_step(directory)
        target = before // EVERY * EVERY + numbers.randint(1, 3)
        try:
            if number % 4 == 3:
                # Now and then before the first step: while it starts, resumes, or drops rows.
                time.sleep(numbers.uniform(0.2, 2.5))
            else:
                wait_until(lambda goal=target: last_step(directory) >= goal, f"step {target}", command)
                time.sleep(numbers.uniform(0.0, 0.25))
            assert command.process.poll() is None, f"kill {number + 1}: the run has ended: {command.wait(1)}"
        finally:
            command.kill()
        sound = assert_newest_is_sound(runs, directory)
        # A checkpoint is committed before the next is taken, which comes after the row of its step.
        assert sound >= (last_step(directory) - 1) // EVERY * EVERY - EVERY
        resumed_from.append(sound)
    assert last_step(directory) < num_steps
    runs.train_well("run", 2, *settings)
    assert bits(directory) == bits(whole)
    assert not list(directory.glob("checkpoints/*.partial"))
    assert not list(directory.glob("checkpoints/trash-*"))
    assert not events(directory, "checkpoint refused")
    assert events(directory, "resumed")[-1]["step"] == resumed_from[-1]
    assert resumed_from == sorted(resumed_from)
    print(f"{num_kills} kills; newest sound checkpoints: {resumed_from}")


def test_killed_at_random_moments(runs: Runs) -> None:
    kill_and_restart(runs, num_kills=4, num_steps=20, seed=4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_twenty_times(runs: Runs) -> None:
    kill_and_restart(runs, num_kills=20, num_steps=70, seed=20)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_is_killed_and_cannot_be_replaced(runs: Runs, finished_run: Path, victim: int) -> None:
    command = runs.start("run", 3, "checkpoint.every=2", environ=SLOW_STEPS, launch=("--recovery", "off"))
    directory = runs.directory("run")
    try:
        wait_until(lambda: last_step(directory) >= 5, "step 5", command)
        pid = command.ranks()[victim]
        started = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        finished = command.wait(15)
        elapsed_s = time.monotonic() - started
        command.assert_nobody_left()
    finally:
        command.kill()
    assert elapsed_s < 10
    assert finished.code == 71, finished.stderr
    (message,) = finished.messages
    for part in (f"rank {victim} ", "signal 9", "run the same command again"):
        assert part in message
    assert status(directory)["state"] == "failed"
    assert status(directory)["exit_code"] == 71
    assert f"rank {victim} " in status(directory)["cause"]
    assert_newest_is_sound(runs, directory)
    runs.train_well("run", 2)
    assert bits(directory) == bits(finished_run)


@pytest.mark.parametrize("victim", ["launch", "mpirun"])
def test_the_launcher_is_killed(runs: Runs, finished_run: Path, victim: str) -> None:
    command = runs.start("run", 2, "checkpoint.every=2", environ=SLOW_STEPS)
    directory = runs.directory("run")
    try:
        wait_until(lambda: last_step(directory) >= 5, "step 5", command)
        mpirun = next(
            pid for pid, line in command.processes().items() if line.split()[0].endswith(("/mpirun", "/prterun"))
        )
        os.kill({"launch": command.process.pid, "mpirun": mpirun}[victim], signal.SIGKILL)
        finished = command.wait(15)
        command.assert_nobody_left(grace_s=10)
    finally:
        command.kill()
    if victim == "mpirun":
        assert finished.code == 71, finished.stderr
        assert len(finished.messages) == 1
        assert status(directory)["state"] == "failed"
        assert status(directory)["exit_code"] == 71
    runs.train_well("run", 2)
    assert bits(directory) == bits(finished_run)


def test_a_third_interrupt_kills_at_once(runs: Runs) -> None:
    command = runs.start("run", 2, environ={"HPCPIPE_TEST_MESSAGES": "delay=1"})
    directory = runs.directory("run")
    try:
        wait_until(lambda: rows(directory), "a row", command)
        for _ in range(3):
            command.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        finished = command.wait(5)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 75, finished.stderr
    assert status(directory)["exit_code"] == 75
