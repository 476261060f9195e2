"""Ranks that hang in real runs: the right one is named in time, and the run goes on with the same bits."""

import time
from pathlib import Path

import pytest
from support.commands import bits, events, status
from support.runs import Runs

from hpcpipe.errors import ExitCode
from hpcpipe.watch.memory import SHARED_MEMORY

HANG_S = 3.0
NAMED_S = 15.0
LIMIT_S = 120.0


def memory_files(directory: Path) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"hpcpipe-{status(directory)['launch_id']}-*"))


@pytest.mark.parametrize(
    ("fault", "culprit", "why"),
    [
        ("stop:process=1:step=8:phase=forward", 1, "suspended"),
        ("spin:process=0:step=8:phase=backward", 0, "computes"),
    ],
    ids=["suspended", "spins with the lock held"],
)
def test_a_rank_that_hangs_is_named_and_replaced(runs: Runs, fault: str, culprit: int, why: str) -> None:
    whole = runs.train_well("whole", 3)
    command = runs.start(
        "run", 3, f"recovery.hang_s={HANG_S}", launch=["--spares", 1], environ={"HPCPIPE_FAULT": fault}
    )
    finished = command.wait(LIMIT_S)
    assert finished.code == 0, finished.stderr
    directory = runs.directory("run")
    (event,) = events(directory, "hang")
    assert event["process"] == event["rank"] == culprit and event["step"] == 8 and why in event["cause"]
    assert (event["stage"], event["microbatch"]) == (culprit, int(event["doing"][-1]))
    assert HANG_S <= event["seconds"] < NAMED_S
    assert f"hpcpipe: hang: process {culprit} (rank {culprit}) has not moved" in finished.stderr
    assert len(events(directory, "recovered")) == 1 and bits(directory) == bits(whole)
    assert len(list((directory / event["stacks"]).glob("rank-*.txt"))) == 4
    told = runs.hpcpipe("report", directory).stdout
    assert f"process {culprit} (rank {culprit}), step 8, {event['doing']}, computes" in told
    command.assert_nobody_left()
    assert memory_files(directory) == []


def test_a_deadlock_that_comes_back_ends_the_run_with_who_waits_for_whom(runs: Runs) -> None:
    fault = {"HPCPIPE_FAULT": "wrongtag:process=1:step=8:times=0"}
    started = time.monotonic()
    command = runs.start("run", 3, f"recovery.hang_s={HANG_S}", environ=fault)
    finished = command.wait(LIMIT_S)
    directory = runs.directory("run")
    assert finished.code == ExitCode.RANK_FAILED == status(directory)["exit_code"]
    assert time.monotonic() - started < 2 * LIMIT_S / 3
    found = events(directory, "deadlock")
    assert [event["action"] for event in found] == ["reset", "reset", "give up"]
    assert all(event["step"] == 8 and event["seconds"] < NAMED_S for event in found)
    assert "process 1 is at fault" in found[0]["cause"]
    assert "process 2 (rank 2), step 8, F2.0, waits for RECV_F2.0 from process 1" in finished.stderr
    assert "cycle: process " in finished.stderr
    command.assert_nobody_left()
    assert memory_files(directory) == []


def test_a_rank_that_is_held_up_for_a_moment_is_left_alone(runs: Runs) -> None:
    fault = {"HPCPIPE_FAULT": "stop:process=1:step=8:phase=forward:seconds=2.6"}
    command = runs.start("run", 2, f"recovery.hang_s={HANG_S}", environ=fault)
    finished = command.wait(LIMIT_S)
    assert finished.code == 0, finished.stderr
    (event,) = events(runs.directory("run"), "straggler")
    assert (event["process"], event["step"], event["doing"], event["why"]) == (1, 8, "F1.0", "suspended")
    assert 1.0 < event["seconds"] < HANG_S
    assert events(runs.directory("run"), "hang") == []
