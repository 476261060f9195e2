"""A run that was stopped and resumed has the rows of one that never stopped, on any grid."""

import signal
from pathlib import Path

import pytest
from support.commands import Command, bits, contents, events, rows, status, step_rows, wait_until
from support.runs import Runs

SLOW_STEPS = {"HPCPIPE_TEST_MESSAGES": "delay=0.02"}
LEAVE_S = 10.0


def stop_in_mid_run(runs: Runs, signum: signal.Signals, *settings: str, num_rows: int = 4) -> Command:
    """Send a signal to ``launch`` after some steps, and wait for a clean stop."""
    command = runs.start("run", 2, *settings, environ=SLOW_STEPS)
    directory = runs.directory("run")
    try:
        wait_until(lambda: len(step_rows(directory)) >= num_rows, f"{num_rows} rows", command)
        command.process.send_signal(signum)
        finished = command.wait(LEAVE_S)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 75, finished.stderr
    assert status(directory)["exit_code"] == 75
    assert status(directory)["state"] == "stopped"
    assert status(directory)["stopped_by"] == "signal"
    assert status(directory)["start_step"] == 0
    assert finished.stderr.startswith("hpcpipe: stopped: ")
    assert finished.stderr.count("hpcpipe:") == 1
    stopped_at = status(directory)["step"]
    assert num_rows <= stopped_at < 20
    assert [row["step"] for row in rows(directory)] == list(range(1, stopped_at + 1))
    return command


@pytest.mark.parametrize(
    ("signum", "num_ranks", "settings"),
    [
        (signal.SIGTERM, 2, ()),
        (signal.SIGINT, 3, ("parallel.schedule=gpipe",)),
        (signal.SIGTERM, 4, ("parallel.data=2",)),
    ],
)
def test_stop_and_resume_on_another_grid(
    runs: Runs, finished_run: Path, signum: signal.Signals, num_ranks: int, settings: tuple[str, ...]
) -> None:
    stop_in_mid_run(runs, signum)
    directory = runs.directory("run")
    stopped_at = status(directory)["step"]
    assert bits(directory) == bits(finished_run)[:stopped_at]
    assert (directory / f"checkpoints/step-{stopped_at:08d}").is_dir()

    runs.train_well("run", num_ranks, *settings)
    assert bits(directory) == bits(finished_run)
    assert events(directory, "resumed")[-1]["step"] == stopped_at
    assert status(directory) | {"time": "", "launch_id": ""} == {
        "state": "done", "step": 20, "start_step": stopped_at, "checkpoint_step": 20, "exit_code": 0, "cause": "",
        "stopped_by": "", "time": "", "launch_id": "", "job": None,
    }  # fmt: skip


def test_stop_without_a_checkpoint_on_signal(runs: Runs, finished_run: Path) -> None:
    stop_in_mid_run(runs, signal.SIGTERM, "checkpoint.on_signal=false", "checkpoint.every=3")
    directory = runs.directory("run")
    newest = int(max((directory / "checkpoints").iterdir()).name.removeprefix("step-"))
    assert newest % 3 == 0
    runs.train_well("run", 2)
    assert events(directory, "resumed")[-1]["step"] == newest
    assert bits(directory) == bits(finished_run)


def test_a_stop_before_the_first_step_leaves_nothing_to_repair(runs: Runs, finished_run: Path) -> None:
    command = runs.start("run", 2)
    try:
        wait_until(lambda: len(command.ranks()) == 2, "two ranks", command)
        command.process.send_signal(signal.SIGTERM)
        finished = command.wait(LEAVE_S)
        command.assert_nobody_left()
    finally:
        command.kill()
    assert finished.code == 75, finished.stderr
    assert finished.stderr.count("hpcpipe:") == 1
    runs.train_well("run", 2)
    assert bits(runs.directory("run")) == bits(finished_run)


def test_fewer_steps_then_more(runs: Runs, finished_run: Path) -> None:
    directory = runs.train_well("run", 2, "train.steps=10")
    assert bits(directory)[:10] == bits(finished_run)[:10]
    runs.train_well("run", 3)
    # The evaluation at the end of the first part stays between the steps.
    assert [row for row in bits(directory) if "val_loss" not in row[1] or row[0] == "step 20"] == bits(finished_run)
    assert [row["step"] for row in rows(directory)] == [*range(1, 11), 10, *range(11, 21), 20]


def test_resume_of_a_finished_run_does_nothing(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    before = contents(directory)
    finished = runs.train("run", 3, "parallel.schedule=auto")
    assert finished.code == 0, finished.stderr
    assert "nothing to do: step 20 is done" in finished.stdout
    assert "simulating" not in finished.stdout and "predicted" not in finished.stdout
    after = contents(directory)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"status.json", "events.jsonl"}
    assert status(directory)["state"] == "done"
    assert status(directory)["step"] == 20


def test_resume_never_refuses_checkpoints(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    before = contents(directory)
    finished = runs.train("run", 2, "--resume", "never")
    assert finished.code == 64
    # What was done stays done.
    assert status(directory)["state"] == "done"
    (message,) = finished.messages
    for part in ("--resume never", str(directory / "checkpoints"), "step-00000020", "run.name"):
        assert part in message
    after = contents(directory)
    for name in before:
        if name.startswith("checkpoints/") or name == "metrics.jsonl":
            assert after[name] == before[name], name


def test_resume_from_the_checkpoint_of_another_run(runs: Runs, finished_run: Path) -> None:
    path = finished_run / "checkpoints/step-00000015"
    directory = runs.train_well("branch", 2, "--resume", path)
    assert bits(directory) == bits(finished_run)[15:]


def test_more_steps_than_were_planned(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    before = bits(directory)
    finished = runs.train("run", 2, "train.steps=24")
    assert finished.code == 0, finished.stderr
    assert bits(directory)[: len(before)] == before
    assert [row["step"] for row in step_rows(directory)] == list(range(1, 25))


@pytest.mark.slow
def test_one_run_on_four_grids(runs: Runs, finished_run: Path) -> None:
    grids = [(2, 1, 2, "1f1b", 6), (4, 1, 4, "1f1b", 11), (3, 3, 1, "gpipe", 15), (4, 2, 2, "zb-v", 20)]
    for num_ranks, pipeline, data, schedule, steps in grids:
        directory = runs.train_well(
            "run",
            num_ranks,
            f"parallel.pipeline={pipeline}",
            f"parallel.data={data}",
            f"parallel.schedule={schedule}",
            f"train.steps={steps}",
        )
        checkpoint = directory / f"checkpoints/step-{steps:08d}"
        assert len(list(checkpoint.glob("rank-*.h5"))) == num_ranks
    assert [row for row in bits(directory) if "val_loss" not in row[1] or row[0] == "step 20"] == bits(finished_run)
    assert runs.hpcpipe("checkpoint", "verify", directory).code == 0
    texts = [runs.hpcpipe("sample", path, "--prompt", "the ", "--tokens", 20) for path in (directory, finished_run)]
    assert texts[0].code == 0 and texts[0].stdout == texts[1].stdout


def test_a_stop_of_two_replicas_is_resumed_by_four(runs: Runs, finished_run: Path) -> None:
    stop_in_mid_run(runs, signal.SIGTERM, "parallel.data=2")
    directory = runs.train_well("run", 4, "parallel.data=4")
    assert bits(directory) == bits(finished_run)
