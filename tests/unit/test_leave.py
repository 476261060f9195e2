"""Leaving a run that failed: the code of the error, whatever lies where the small files belong."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcpipe.errors import DamagedError, DiskError, ExitCode, InUseError, StoppedError
from hpcpipe.train import leave

ALONE = SimpleNamespace(rank=0, size=1)


class EndedError(BaseException):
    """Stands for the end of all ranks."""


@pytest.fixture
def aborted(monkeypatch):
    """Collect the codes that ranks are ended with, without ending this process."""
    codes = []

    def abort(code):
        codes.append(code)
        raise EndedError

    # MPI has no names before it is started.
    monkeypatch.setattr(leave.runtime, "report_traceback", lambda world: print("a defect", file=sys.stderr, flush=True))
    monkeypatch.setattr(leave.runtime, "abort", abort)
    monkeypatch.setattr(leave.signal, "signal", lambda *arguments: None)
    return codes


def fail_on_all_ranks(directory):
    error = DamagedError("broken")
    error.on_all_ranks = True
    with leave.leaving_together(ALONE, directory) as outcome:
        raise error
    return outcome.code


def test_an_error_is_told_and_written(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    assert fail_on_all_ranks(tmp_path) is ExitCode.DAMAGED
    assert capsys.readouterr().err == "hpcpipe: error: broken\n"
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"], status["cause"]) == ("failed", 65, 7, "broken")


def test_a_run_that_is_done_stays_so(tmp_path, capsys):
    (tmp_path / "status.json").write_text('{"state": "done", "exit_code": 0, "step": 20}')
    assert fail_on_all_ranks(tmp_path) is ExitCode.DAMAGED
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 20)
    assert (status["later_start"]["exit_code"], status["later_start"]["cause"]) == (65, "broken")


def test_a_stop_says_who_asked_and_where_the_run_began(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HPCPIPE_LAUNCH_ID", "abc")
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    error = StoppedError("asked")
    error.on_all_ranks, error.by = True, "allocation"
    for launch_id, start_step in (("abc", 5), ("another", 7)):
        status = {"state": "running", "exit_code": None, "launch_id": launch_id, "start_step": 5}
        (tmp_path / "status.json").write_text(json.dumps(status))
        with leave.leaving_together(ALONE, tmp_path) as outcome:
            raise error
        assert outcome.code is ExitCode.STOPPED
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status["stopped_by"], status["start_step"]) == ("stopped", "allocation", start_step)
    assert capsys.readouterr().err == "hpcpipe: stopped: asked\n" * 2


def a_file_above(path):
    path.parent.rmdir()
    path.parent.touch()
    return path


def a_long_name(path):
    return path.with_name("x" * 300)


def metrics_that_are_a_directory(path):
    (path / "metrics.jsonl").mkdir(parents=True)
    return path


def status_that_is_a_directory(path):
    (path / "status.json").mkdir(parents=True)
    return path


def a_lock_that_is_a_directory(path):
    (path / "lock.json").mkdir(parents=True)
    return path


def a_name_with_a_null(path):
    return Path(f"{path}\0")


PLACES = [
    a_file_above,
    a_long_name,
    metrics_that_are_a_directory,
    status_that_is_a_directory,
    a_lock_that_is_a_directory,
    a_name_with_a_null,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_the_code_stays_wherever_the_run_directory_is(tmp_path, place, aborted):
    (tmp_path / "runs").mkdir()
    directory = place(tmp_path / "runs" / "run")
    assert fail_on_all_ranks(directory) is ExitCode.DAMAGED
    with pytest.raises(EndedError), leave.leaving_together(ALONE, directory):
        raise DiskError("full")
    with pytest.raises(EndedError), leave.leaving_together(ALONE, directory):
        raise RuntimeError("a defect")
    assert aborted == [ExitCode.DISK, ExitCode.RANK_FAILED]


def test_other_ranks_are_ended_when_nobody_listens(tmp_path, aborted, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        with pytest.raises(EndedError), leave.leaving_together(ALONE, tmp_path):
            raise DiskError("full")
        with pytest.raises(EndedError), leave.leaving_together(ALONE, tmp_path):
            raise RuntimeError("a defect")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), closed.fileno())
    assert aborted == [ExitCode.DISK, ExitCode.RANK_FAILED]


def test_a_directory_in_use_is_left_alone(tmp_path):
    error = InUseError("in use")
    error.on_all_ranks = True
    with leave.leaving_together(ALONE, tmp_path) as outcome:
        raise error
    assert outcome.code is ExitCode.IN_USE
    assert list(tmp_path.iterdir()) == []
