"""Two runs in one directory: exactly one of them runs, also where the other does not know that it has been replaced."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import Command, bits, events, status, step_rows, wait_until
from support.runs import Runs

from hpcpipe.cluster.holder import this_process
from hpcpipe.train.lock import RunLock

SLOW_STEPS = {"HPCPIPE_TEST_MESSAGES": "delay=0.05"}
REFUSED_WITHIN_S = 5.0


def start_two(runs: Runs, name: str) -> None:
    """Start a run twice at once; one must be refused in time, the other must run on until it is asked to stop."""
    directory = runs.directory(name)
    marks = [runs.root / f"{name}.{number}" for number in range(2)]
    commands = [Command(runs.arguments(name, 1), mark, SLOW_STEPS) for mark in marks]
    began = time.monotonic()
    try:
        while all(command.process.poll() is None for command in commands):
            assert time.monotonic() - began < 60, "none was refused"
            time.sleep(0.01)
        refused_after_s = time.monotonic() - began
        (refused,) = [command for command in commands if command.process.poll() is not None]
        (running,) = [command for command in commands if command is not refused]
        finished = refused.wait(1)
        assert finished.code == 73, finished.stderr
        assert refused_after_s < REFUSED_WITHIN_S
        (message,) = finished.messages
        assert f"{directory} is in use by process " in message
        wait_until(lambda: step_rows(directory), "a step", running)
        assert status(directory)["state"] == "running"
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(20).code == 75
        for command in commands:
            command.assert_nobody_left()
    finally:
        for command in commands:
            command.kill()
    assert status(directory)["state"] == "stopped"
    assert not list(directory.glob("lock.json*"))
    print(f"refused after {refused_after_s:.2f} s")


@pytest.mark.parametrize("number", range(5))
def test_of_two_at_once_exactly_one_runs(runs: Runs, number: int) -> None:
    start_two(runs, f"run{number}")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_of_two_at_once_exactly_one_runs_fifty_times(runs: Runs) -> None:
    for number in range(50):
        start_two(runs, f"run{number}")


def test_a_run_that_lost_its_lock_writes_nothing_more(runs: Runs) -> None:
    command = runs.start("run", 2, environ=SLOW_STEPS)
    directory = runs.directory("run")
    try:
        wait_until(lambda: len(step_rows(directory)) >= 2, "two steps", command)
        # As if this machine had been out of reach, and another one had taken over.
        other = replace(this_process(), host="elsewhere", pid=12)
        (directory / "status.json").write_text("the other's")
        (directory / "lock.json").write_bytes(other.to_bytes())
        finished = command.wait(20)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 73, finished.stderr
    (message,) = finished.messages
    assert "taken over by process 12 on elsewhere" in message
    assert (directory / "status.json").read_text() == "the other's"
    assert json.loads((directory / "lock.json").read_text())["fence"] == other.fence


def test_a_suspended_run_finds_that_it_was_replaced(runs: Runs, finished_run: Path) -> None:
    command = runs.start("run", 2, environ=SLOW_STEPS)
    directory = runs.directory("run")
    try:
        wait_until(lambda: len(step_rows(directory)) >= 3, "three steps", command)
        suspended = list(command.processes())
        for pid in suspended:
            os.kill(pid, signal.SIGSTOP)
        # On another machine nobody can know more than that the lock is not renewed.
        lock_path = directory / "lock.json"
        holder = json.loads(lock_path.read_text())
        elsewhere = replace(this_process(), host="elsewhere", boot_id="another")
        lock = RunLock(lock_path, elsewhere)
        assert lock.acquire() == f"process {holder['pid']} on {holder['host']}"
        before = (directory / "metrics.jsonl").read_bytes()
        for pid in reversed(suspended):
            os.kill(pid, signal.SIGCONT)
        finished = command.wait(30)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 73, finished.stderr
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert lock.is_ours()
    lock.release()
    runs.train_well("run", 2)
    assert bits(directory) == bits(finished_run)


def test_a_dead_run_s_lock_is_taken_over_and_told(runs: Runs) -> None:
    command = runs.start("run", 1, environ=SLOW_STEPS)
    directory = runs.directory("run")
    try:
        wait_until(lambda: step_rows(directory), "a step", command)
    finally:
        command.kill()
    assert (directory / "lock.json").exists()
    finished = runs.train("run", 1)
    assert finished.code == 0, finished.stderr
    (event,) = events(directory, "lock taken over")
    assert event["holder"].startswith("process ")
    assert f"lock taken over: {event['holder']}" in finished.stdout
