"""Numbers that go wrong in whole runs: what can be repaired leaves no trace in the bits, the rest is skipped."""

from pathlib import Path

from support.commands import bits, events, status, step_rows
from support.runs import Runs

BAD_STEP = {"HPCPIPE_FAULT": "nan:in=gradient:rank=0:step=7:times=0"}


def test_flipped_bits_and_changed_messages_leave_no_trace(runs: Runs, finished_run: Path) -> None:
    faults = (
        "flip:in=message:rank=1:step=4;flip:in=weight:rank=2:step=8;nan:in=gradient:rank=0:step=13;"
        "flip:in=moment:rank=0:step=17"
    )
    directory = runs.directory("run")
    finished = runs.train("run", 4, "parallel.data=2", "parallel.lanes=4", environ={"HPCPIPE_FAULT": faults})
    assert finished.code == 0, finished.stderr
    plain = runs.train_well("plain", 4, "parallel.data=2", "parallel.lanes=4")
    assert bits(directory) == bits(plain)
    assert bits(directory) == bits(finished_run)
    assert [(event["step"], event["receiver"]) for event in events(directory, "message changed")] == [(4, 1)]
    assert [event["step"] for event in events(directory, "not finite once")] == [13]
    changed = [(event["step"], event["rank"], event["kind"]) for event in events(directory, "state changed")]
    assert [(step, rank, kind[:6]) for step, rank, kind in changed] == [(8, 2, "weight"), (17, 0, "moment")]
    assert len(events(directory, "recovered")) == 2
    for name in ("state changed", "message changed", "recovered", "not finite once"):
        assert events(plain, name) == []


def test_a_run_that_cannot_recover_ends_and_goes_on_from_its_checkpoint(runs: Runs, finished_run: Path) -> None:
    command = runs.start(
        "run", 2, environ={"HPCPIPE_FAULT": "flip:in=weight:rank=1:step=15"}, launch=["--recovery", "off"]
    )
    finished = command.wait(120)
    command.assert_nobody_left()
    assert finished.code == 71
    (message,) = finished.messages
    assert "a weight of stage 1 on rank 1 had changed since the last update, seen in step 15" in message
    assert bits(runs.train_well("run", 2)) == bits(finished_run)


def test_a_skipped_step_is_skipped_alike_on_all_grids_and_after_restarts(runs: Runs) -> None:
    alone = runs.directory("alone")
    assert runs.train("alone", 1, environ=BAD_STEP).code == 0
    (skipped,) = [row for row in step_rows(alone) if row.get("skipped")]
    assert (skipped["step"], skipped["loss"], skipped["grad_norm"]) == (7, None, None)
    (event,) = events(alone, "step skipped")
    assert (event["step"], event["rank"], event["part"], event["stage"]) == (7, 0, "sum of the gradients", 0)
    directory = runs.directory("run")
    assert runs.train("run", 2, "train.steps=8", environ=BAD_STEP).code == 0
    assert runs.train("run", 3, environ=BAD_STEP).code == 0
    for mine, theirs in zip(step_rows(directory), step_rows(alone), strict=True):
        assert [mine[key] for key in ("step", "loss", "grad_norm")] == [
            theirs[key] for key in ("step", "loss", "grad_norm")
        ]


def test_too_many_steps_that_are_not_finite_go_back_and_end_the_run(runs: Runs) -> None:
    faults = {"HPCPIPE_FAULT": "nan:in=gradient:rank=1:step=14-20:times=0"}
    finished = runs.train("run", 2, "guard.max_skipped=2", environ=faults)
    directory = runs.directory("run")
    assert finished.code == 70
    (message,) = finished.messages
    for part in ("step 16: not finite, nor since step 14, again after going back", "rank 1", "last checkpoint"):
        assert part in message
    (back,) = events(directory, "going back")
    assert (back["step"], back["to_step"]) == (16, 13)
    assert [event["step"] for event in events(directory, "step skipped")] == [14, 15, 14, 15]
    assert status(directory)["exit_code"] == 70
