"""What a user sees of a run that loses ranks: who says so, what is kept, and how to go on."""

import os
import signal
import time
from pathlib import Path

import pytest
from support.commands import bits, events, status, step_rows, wait_until
from support.runs import Runs

from hpcpipe.faults.parse import VARIABLE

SLOW_STEPS = {"HPCPIPE_TEST_MESSAGES": "delay=0.02"}


def last_step(directory: Path) -> int:
    """Return the step of the last whole row."""
    return max((row["step"] for row in step_rows(directory)), default=0)


def test_a_killed_rank_is_replaced_and_the_story_is_told(runs: Runs, finished_run) -> None:
    command = runs.start("run", 3, environ=SLOW_STEPS, launch=("--spares", 1))
    directory = runs.directory("run")
    try:
        wait_until(lambda: last_step(directory) >= 5, "step 5", command)
        (processes,) = events(directory, "processes")
        os.kill(processes["pids"][1], signal.SIGKILL)
        finished = command.wait(60)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert (finished.code, finished.stderr) == (0, "")
    assert bits(directory) == bits(finished_run)
    (recovered,) = events(directory, "recovered")
    assert recovered["cause"] == "rank 1 (process 1) died"
    assert (recovered["source"], recovered["processes"], recovered["spares"]) == ("memory", [0, 3, 2], 0)
    assert recovered["lost_steps"] <= 1
    assert "recovery: the run goes on when a rank dies, with 1 spare\n" in finished.stdout
    assert "from memory: rank 1 (process 1) died; going on from step" in finished.stdout


def test_a_stop_at_the_moment_of_a_death_saves_what_memory_has(runs: Runs, finished_run) -> None:
    command = runs.start("run", 3, environ=SLOW_STEPS, launch=("--spares", 1))
    directory = runs.directory("run")
    try:
        wait_until(lambda: last_step(directory) >= 5, "step 5", command)
        (processes,) = events(directory, "processes")
        command.process.send_signal(signal.SIGTERM)
        os.kill(processes["pids"][0], signal.SIGKILL)
        finished = command.wait(60)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 75, finished.stderr
    found = status(directory)
    assert found["checkpoint_step"] == found["step"] >= 5
    assert found["stopped_by"] == "signal"
    runs.train_well("run", 2)
    assert bits(directory) == bits(finished_run)


def test_survivors_that_are_too_few_say_so_though_rank_0_is_dead(runs: Runs) -> None:
    command = runs.start("run", 3, "parallel.partition=[2,2,1]", environ=SLOW_STEPS)
    directory = runs.directory("run")
    try:
        wait_until(lambda: last_step(directory) >= 3, "step 3", command)
        os.kill(events(directory, "processes")[0]["pids"][0], signal.SIGKILL)
        finished = command.wait(30)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 75
    (message,) = finished.stderr.splitlines()
    assert message.startswith("hpcpipe: stopped: ")
    assert "2 processes are left for 3 ranks" in message
    assert "--spares" in message
    found = status(directory)
    assert (found["state"], found["exit_code"], found["stopped_by"]) == ("stopped", 75, "")
    assert found["cause"] in message
    assert "a rank that dies ends the run" in finished.stdout
    assert not (directory / "lock.json").exists()


@pytest.mark.slow
def test_a_rank_that_dies_again_and_again(runs: Runs, finished_run) -> None:
    fault = {VARIABLE: "kill:rank=1:phase=forward:step=6:times=0"}
    command = runs.start("run", 3, "checkpoint.every=2", environ=fault, launch=("--spares", 8))
    directory = runs.directory("run")
    try:
        finished = command.wait(120)
    finally:
        command.kill()
    assert finished.code == 75
    told = events(directory, "recovered")
    assert [event["source"] for event in told] == ["memory"] * 3 + ["disk"] * 3
    runs.train_well("run", 2)
    assert bits(directory) == bits(finished_run)


def test_waiting_spares_use_no_processor(runs: Runs) -> None:
    command = runs.start("run", 2, "train.steps=400", environ=SLOW_STEPS, launch=("--spares", 1))
    directory = runs.directory("run")
    try:
        wait_until(lambda: last_step(directory) >= 2, "step 2", command)
        spare = events(directory, "processes")[0]["pids"][2]
        before, start = cpu_s(spare), time.monotonic()
        time.sleep(5)
        used = (cpu_s(spare) - before) / (time.monotonic() - start)
    finally:
        command.kill()
    assert used < 0.02


def cpu_s(pid: int) -> float:
    """Return the processor time of a process."""
    words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
