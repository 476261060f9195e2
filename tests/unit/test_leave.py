"""Leaving a run that failed: the code of the error, whatever lies where the small files belong."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcpipe.errors import DamagedError, DiskError, ExitCode, InUseError, StoppedError
from hpcpipe.mpi.crew import CommunicationError
from hpcpipe.train import leave
from hpcpipe.train.last_status import has_last_word

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


NUM_RANKS = 3


class DiedError(BaseException):
    """Stands for the death of a process."""


@pytest.fixture
def survivors(tmp_path, monkeypatch):
    """Let processes survive each other, in threads of this one; return a function that lets each raise an error."""
    broken = threading.Event()

    def die(comm):
        broken.set()
        raise DiedError

    def revoke(comm):
        broken.set()

    monkeypatch.setenv("HPCPIPE_LAUNCH_ID", "abc")
    monkeypatch.setattr(leave, "has_fault_tolerance", lambda: True)
    monkeypatch.setattr(leave, "_SPEAK_S", 0.2)
    monkeypatch.setattr(leave.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(leave.runtime, "abort", lambda code: pytest.fail("aborted"))
    monkeypatch.setattr(leave.runtime, "report_traceback", lambda world: print("a defect", file=sys.stderr, flush=True))
    monkeypatch.setattr(leave.ending, "die", die)
    monkeypatch.setattr(leave.ending, "revoke", revoke)
    monkeypatch.setattr(leave.ending, "is_broken", lambda comm: broken.is_set())
    monkeypatch.setattr(leave.ending, "dead_processes", lambda comm: [1])
    ended = []

    def leave_with(rank, error, crew=None):
        world = SimpleNamespace(rank=rank, size=NUM_RANKS, comm=None)
        try:
            with leave.leaving_together(world, tmp_path) as outcome:
                outcome.crew = crew
                if isinstance(error, CommunicationError) and int(error) in (75, 77):
                    assert broken.wait(10)
                raise error
        except DiedError:
            ended.append(rank)

    def run(errors, crew=None):
        threads = [threading.Thread(target=leave_with, args=(*item, crew)) for item in errors.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return sorted(ended)

    run.broken = broken
    return run


@pytest.mark.parametrize("rank", range(NUM_RANKS))
@pytest.mark.parametrize(("error", "code"), [(DiskError("full"), 74), (RuntimeError("odd"), 71)])
def test_one_speaks_and_the_survivors_die_silently(tmp_path, capsys, survivors, rank, error, code):
    errors = {each: CommunicationError(77) for each in range(NUM_RANKS)} | {rank: error}
    assert survivors(errors) == [*range(NUM_RANKS)]
    told = f"hpcpipe: error: rank {rank} of 3: full\n" if code == 74 else "a defect\n"
    assert capsys.readouterr().err == told
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["exit_code"], status["launch_id"]) == (code, "abc")


def test_the_same_error_of_all_is_told_by_the_first(capsys, survivors):
    assert survivors({rank: DiskError("full") for rank in range(NUM_RANKS)}) == [0, 1, 2]
    assert capsys.readouterr().err == "hpcpipe: error: rank 0 of 3: full\n"


def test_a_process_that_died_without_a_word_is_named_by_the_first_survivor(tmp_path, capsys, survivors):
    survivors.broken.set()
    assert survivors({0: CommunicationError(77), 2: CommunicationError(75)}) == [0, 2]
    assert capsys.readouterr().err.startswith("hpcpipe: error: rank 1 of 3 died while the run was started")
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 71


def test_an_error_in_communication_without_a_death_is_a_defect(tmp_path, capsys, survivors):
    assert survivors({1: CommunicationError(15)}) == [1]
    assert capsys.readouterr().err == "a defect\n"
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 71


def test_a_process_that_others_replace_writes_no_status(tmp_path, capsys, survivors):
    crew = SimpleNamespace(comm=None, revoke=lambda: survivors.broken.set())
    assert survivors({2: RuntimeError("odd")}, crew) == [2]
    assert capsys.readouterr().err == "a defect\n"
    assert survivors.broken.is_set()
    assert not (tmp_path / "status.json").exists()


def test_the_last_word_is_of_this_launch(tmp_path, monkeypatch):
    def word(**status):
        (tmp_path / "status.json").write_text(json.dumps(status))
        return has_last_word(tmp_path, began_s)

    began_s = time.time() - 10
    assert not has_last_word(None, began_s)
    assert not has_last_word(tmp_path, began_s)
    monkeypatch.setenv("HPCPIPE_LAUNCH_ID", "abc")
    assert word(exit_code=71, launch_id="abc")
    assert not word(exit_code=None, launch_id="abc")
    assert not word(exit_code=71, launch_id="other")
    assert word(exit_code=0, launch_id="other", later_start={"exit_code": 64, "launch_id": "abc"})
    monkeypatch.delenv("HPCPIPE_LAUNCH_ID")
    assert word(exit_code=71, launch_id="")
    began_s = time.time() + 10
    assert not word(exit_code=71, launch_id="")
