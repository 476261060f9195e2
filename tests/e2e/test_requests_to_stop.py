"""Stops that no signal asks for, stops at bad moments, and what a stop leaves out."""

import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from support.commands import WRITER, Command, bits, events, status, step_rows, wait_until
from support.runs import Runs

SLOW_STEPS = {"HPCPIPE_TEST_MESSAGES": "delay=0.02"}
LEAVE_S = 20.0


def halted(runs: Runs, words: str, *settings: str) -> Path:
    """Train with a halt file in the run directory, which must be obeyed and put away."""
    directory = runs.directory("run")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "halt").write_text(words)
    finished = runs.train("run", 2, *settings)
    assert finished.code == 75, finished.stderr
    assert finished.stderr.startswith("hpcpipe: stopped: asked to stop (halt file")
    assert (status(directory)["state"], status(directory)["stopped_by"]) == ("stopped", "halt")
    assert not (directory / "halt").exists()
    assert (directory / "halt.done").read_text() == words
    return directory


def test_a_halt_after_a_step(runs: Runs, finished_run: Path) -> None:
    directory = halted(runs, "step 7\n")
    assert [row["step"] for row in step_rows(directory)] == list(range(1, 8))
    assert status(directory)["step"] == status(directory)["checkpoint_step"] == 7
    assert events(directory, "stopped")[-1]["by"] == "halt"
    # The same step again stops before a step is run.
    halted(runs, "step 7\n")
    assert "asked to stop (halt file: step 7) before the first step" in status(directory)["cause"]
    assert status(directory)["start_step"] == status(directory)["step"] == 7
    runs.train_well("run", 3)
    assert bits(directory) == bits(finished_run)


def test_a_halt_by_command_and_one_that_makes_no_sense(runs: Runs, finished_run: Path) -> None:
    command = runs.start("run", 2, environ={"HPCPIPE_TEST_MESSAGES": "delay=0.1"})
    directory = runs.directory("run")
    try:
        wait_until(lambda: step_rows(directory), "a step", command)
        (directory / "halt").write_text("next week")
        wait_until(lambda: events(directory, "halt file refused"), "a warning", command)
        assert runs.hpcpipe("halt", directory).code == 0
        finished = command.wait(LEAVE_S)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 75, finished.stderr
    assert len(events(directory, "halt file refused")) == 1
    assert finished.stdout.count("'next week' is no time to stop") == 1
    runs.train_well("run", 2)
    assert bits(directory) == bits(finished_run)


def test_the_end_of_the_allocation(runs: Runs, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text('#!/bin/sh\necho "$@" >> "$0.asked"\necho 0:20\n')
    (folder / "squeue").chmod(stat.S_IRWXU)
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    # Without mpirun, which would look for the nodes of that job.
    words = [sys.executable, "-m", "hpcpipe", *runs.arguments("run", 1, ["train.steps=100000"])[3:]]
    command = Command(words, tmp_path / "output", environ)
    try:
        finished = command.wait(60)
    finally:
        command.kill()
    directory = runs.directory("run")
    assert finished.code == 75, finished.stderr
    assert "end of the Slurm allocation at 20" in finished.stderr
    assert status(directory)["stopped_by"] == "allocation"
    assert status(directory)["job"] == {"id": 7, "restart_count": 2}
    assert (folder / "squeue.asked").read_text() == "-h -j 7 -o %L\n"


def test_a_stop_while_kernels_are_compiled(runs: Runs, tmp_path: Path) -> None:
    command = runs.start("run", 2, environ={"HPCPIPE_CACHE_DIR": str(tmp_path / "cache")})
    directory = runs.directory("run")
    shown = runs.root / "run.output/stdout"
    try:
        wait_until(lambda: "compiling kernels" in shown.read_text(), "the compiler", command)
        command.process.send_signal(signal.SIGTERM)
        finished = command.wait(LEAVE_S)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 75, finished.stderr
    assert finished.stderr.count("hpcpipe:") == 1
    assert status(directory)["state"] == "stopped"
    assert "before the first step" in status(directory)["cause"]
    assert status(directory)["step"] == status(directory)["start_step"] == 0
    assert events(directory, "stopped")


@pytest.mark.parametrize("eval_every", [1, 3])
def test_rows_of_evaluations_are_those_of_an_undisturbed_run(runs: Runs, eval_every: int) -> None:
    settings = (f"train.eval_every={eval_every}", "train.steps=8", "train.decay_steps=8")
    whole = runs.train_well("whole", 2, *settings)
    directory = halted(runs, "step 3\n", *settings)
    halted(runs, "step 5\n", *settings)
    runs.train_well("run", 1, *settings)
    assert bits(directory) == bits(whole)
    assert sum("val_loss" in row[1] for row in bits(directory)) == {1: 8, 3: 3}[eval_every]


def test_further_signals_while_a_slow_disk_writes(runs: Runs, finished_run: Path) -> None:
    command = runs.start("run", 2, environ=SLOW_STEPS)
    directory = runs.directory("run")
    writers: list[int] = []
    try:
        wait_until(lambda: len(step_rows(directory)) >= 3, "three steps", command)
        writers = [pid for pid, words in command.processes().items() if WRITER in words]
        assert len(writers) == 2
        # A disk that does not take a byte for a while.
        for pid in writers:
            os.kill(pid, signal.SIGSTOP)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            command.process.send_signal(number)
            time.sleep(0.4)
        for pid in command.ranks():
            os.kill(pid, signal.SIGTERM)
        assert command.process.poll() is None
        assert not list(directory.glob("checkpoints/step-????????"))
        for pid in writers:
            os.kill(pid, signal.SIGCONT)
        finished = command.wait(LEAVE_S)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 75, finished.stderr
    assert finished.stderr.count("hpcpipe:") == 1
    stopped_at = status(directory)["step"]
    assert status(directory)["checkpoint_step"] == stopped_at == len(step_rows(directory))
    assert runs.hpcpipe("checkpoint", "verify", directory).code == 0
    runs.train_well("run", 2)
    assert bits(directory) == bits(finished_run)


def test_a_run_that_is_done_stays_done(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    finished = runs.train("run", 2, "model.width=64")
    assert finished.code == 64
    assert (status(directory)["state"], status(directory)["exit_code"]) == ("done", 0)
    # With more steps to do it is not done any more.
    command = runs.start("run", 2, "train.steps=1000", environ=SLOW_STEPS, launch=("--recovery", "off"))
    try:
        wait_until(lambda: len(step_rows(directory)) > 21, "more steps", command)
        assert (status(directory)["state"], status(directory)["start_step"]) == ("running", 20)
        os.kill(command.ranks()[1], signal.SIGKILL)
        assert command.wait(LEAVE_S).code == 71
    finally:
        command.kill()
    assert (status(directory)["state"], status(directory)["exit_code"]) == ("failed", 71)
    assert (status(directory)["start_step"], status(directory)["checkpoint_step"]) == (20, 20)
    assert status(directory)["step"] > 20
