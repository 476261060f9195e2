"""Requests to stop: signals, the halt file, the end of the allocation."""

import os
import signal
import stat
import time
from datetime import datetime

import pytest

from hpcpipe.cli import main
from hpcpipe.cluster.slurm import AllocationEnd, read_time_left
from hpcpipe.errors import ExitCode, UsageError
from hpcpipe.train import halt as halt_module
from hpcpipe.train import stop as stop_module
from hpcpipe.train.halt import HaltFile, parse_halt
from hpcpipe.train.stop import StopRequest, time_needed

NOON = datetime(2026, 3, 5, 12, 0).timestamp()


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in stop_module.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def at_every_look(monkeypatch):
    monkeypatch.setattr(halt_module, "_LOOK_EVERY_S", 0.0)


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Put a stand-in for squeue first on PATH; the function it returns sets its answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def answer(script):
        (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "squeue").chmod(stat.S_IRWXU)

    return answer


def heard(end):
    """Return what is left once Slurm has answered."""
    end.left_s()
    if end._asked is not None:
        end._asked.wait(10)
    return end.left_s()


@pytest.mark.parametrize(
    ("text", "step", "seconds_from_noon"),
    [
        ("", 0, None),
        ("now\n", 0, None),
        ("NOW", 0, None),
        ("step 1200\n", 1200, None),
        ("  Step   7 ", 7, None),
        ("time 18:00", None, 6 * 3600),
        ("18:00:30", None, 6 * 3600 + 30),
        ("time 12:00", None, 0),
        ("time 9:30", None, 21 * 3600 + 1800),
        ("time 2026-03-05T13:00", None, 3600),
    ],
)
def test_what_a_halt_file_may_say(text, step, seconds_from_noon):
    halt = parse_halt(text, NOON)
    assert halt.step == step
    assert halt.time_s == (None if seconds_from_noon is None else NOON + seconds_from_noon)


def test_a_time_with_a_zone():
    assert parse_halt("time 2026-11-21T18:00:00Z", 0.0).time_s == 1795284000
    assert parse_halt("time 2026-11-21T18:00:00+02:00", 0.0).time_s == 1795284000 - 7200


@pytest.mark.parametrize(
    "text", ["later", "step", "step -1", "step 1.5", "step 9" + 99 * "9", "time", "25:00", "time 1"]
)
def test_what_a_halt_file_must_not_say(text):
    with pytest.raises(UsageError, match="step N, time 2026-01-31T18:00:00Z or time 18:00"):
        parse_halt(text, NOON)


def test_a_halt_after_a_step_or_a_time():
    after = parse_halt("step 5", NOON)
    assert [after.is_due(step, NOON) for step in (4, 5, 6)] == [False, True, True]
    later = parse_halt("time 13:00", NOON)
    assert [later.is_due(1, NOON + seconds) for seconds in (3599, 3600)] == [False, True]
    assert parse_halt("", NOON).is_due(0, 0.0)


def test_the_halt_file_is_obeyed_and_put_away(tmp_path, at_every_look):
    warnings = []
    file = HaltFile(tmp_path / "halt", warnings.append)
    assert file.asks(1) == ""
    (tmp_path / "halt").write_text("step 3\n")
    assert [file.asks(step) for step in (1, 2, 3)] == ["", "", "halt file: step 3"]
    (tmp_path / "halt").write_text("step 30\n")
    assert file.asks(4) == ""
    (tmp_path / "halt").unlink()
    assert file.asks(40) == ""
    (tmp_path / "halt").write_text("now\n")
    assert file.asks(5) == "halt file"
    file.put_away()
    assert [path.name for path in tmp_path.iterdir()] == ["halt.done"]
    assert file.asks(6) == ""
    assert warnings == []


def test_an_empty_halt_file_counts_when_it_stays_empty(tmp_path, at_every_look):
    file = HaltFile(tmp_path / "halt", pytest.fail)
    (tmp_path / "halt").touch()
    # A shell is about to write to it.
    assert file.asks(1) == ""
    (tmp_path / "halt").write_text("step 9\n")
    assert file.asks(2) == ""
    (tmp_path / "halt").write_text("")
    assert [file.asks(3), file.asks(4)] == ["", "halt file"]


def test_a_halt_file_that_makes_no_sense_is_told_once(tmp_path, at_every_look):
    warnings = []
    file = HaltFile(tmp_path / "halt", warnings.append)
    for text in ("tomorrow", "\0\xff"):
        (tmp_path / "halt").write_text(text, encoding="latin-1")
        assert [file.asks(step) for step in range(5)] == [""] * 5
    assert len(warnings) == 2
    assert "'tomorrow' is no time to stop" in warnings[0] and "the run goes on" in warnings[0]
    (tmp_path / "halt").unlink()
    (tmp_path / "halt").mkdir()
    assert [file.asks(step) for step in range(5)] == [""] * 5
    (tmp_path / "halt").rmdir()
    os.mkfifo(tmp_path / "halt")
    assert [file.asks(step) for step in range(5)] == [""] * 5
    assert [warning.partition("halt: ")[2] for warning in warnings[2:]] == [
        "is not a regular file; the run goes on"
    ] * 2


def test_the_halt_file_is_read_once_a_second(tmp_path):
    file = HaltFile(tmp_path / "halt", pytest.fail)
    assert file.asks(1) == ""
    (tmp_path / "halt").write_text("now")
    assert file.asks(2) == ""
    file._next_look_s -= 1.0
    assert file.asks(3) == "halt file"


def test_the_first_request_counts(tmp_path, at_every_look):
    stop = StopRequest()
    stop.watch(HaltFile(tmp_path / "halt", pytest.fail), None)
    stop.look(1, 0.5, 0.1)
    assert not stop.is_set
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    (tmp_path / "halt").write_text("now")
    stop.look(2, 0.5, 0.1)
    assert (stop.kind, stop.name) == ("signal", "SIGUSR1")
    stop.conclude()
    # The file was not obeyed yet.
    assert (tmp_path / "halt").exists()
    error = stop.error("after step 2", "; again")
    assert str(error) == "asked to stop (SIGUSR1) after step 2; again"
    assert (error.by, error.exit_code, error.on_all_ranks) == ("signal", ExitCode.STOPPED, True)


def test_a_closed_terminal_asks_to_stop_unless_that_is_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.is_set
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = StopRequest()
    signal.raise_signal(signal.SIGHUP)
    assert (stop.kind, stop.name) == ("signal", "SIGHUP")


def test_a_halt_file_stops_the_run(tmp_path, at_every_look):
    stop = StopRequest()
    stop.watch(HaltFile(tmp_path / "halt", pytest.fail), None)
    (tmp_path / "halt").write_text("step 4")
    asked = []
    for step in (3, 4):
        stop.look(step, 0.5, 0.1)
        asked.append(stop.is_set)
    assert asked == [False, True]
    assert (stop.kind, stop.name) == ("halt", "halt file: step 4")
    stop.conclude()
    assert (tmp_path / "halt.done").read_text() == "step 4"
    assert not (tmp_path / "halt").exists()


def test_a_request_on_another_rank_counts_as_a_signal():
    error = StopRequest().error("after step 2", "")
    assert (str(error), error.by) == ("asked to stop (a signal on another rank) after step 2", "signal")


def test_the_end_of_the_allocation_stops_in_time(tmp_path):
    class Clock:
        left = 1000.0

        def left_s(self):
            return self.left

    stop, clock = StopRequest(), Clock()
    stop.watch(HaltFile(tmp_path / "halt", pytest.fail), clock)
    assert time_needed(10.0, 5.0) == 60.0
    stop.look(1, 0.0, 0.0)
    stop.look(2, 10.0, 5.0)
    # The longest of the last steps counts.
    for step in range(3, 20):
        clock.left = 60.5
        stop.look(step, 2.0, 5.0)
        assert not stop.is_set
    clock.left = 59.5
    stop.look(20, 2.0, 5.0)
    assert stop.kind == "allocation"
    assert stop.name.startswith("end of the Slurm allocation at 20")


def test_a_slow_step_long_ago_does_not_count(tmp_path):
    stop = StopRequest()
    stop.watch(HaltFile(tmp_path / "halt", pytest.fail), None)
    for step in range(1, 30):
        stop.look(step, 100.0 if step == 2 else 1.0, 0.0)
    assert max(stop._steps_s) == 1.0


def test_a_look_takes_microseconds(tmp_path, squeue):
    squeue("echo 1:00:00")
    stop, end = StopRequest(), AllocationEnd()
    assert heard(end) > 3500
    stop.watch(HaltFile(tmp_path / "halt", pytest.fail), end)
    best_s = float("inf")
    for _ in range(20):
        began = time.process_time()
        for step in range(1000):
            stop.look(step, 0.01, 0.1)
        best_s = min(best_s, (time.process_time() - began) / 1000)
    assert not stop.is_set
    assert best_s < 20e-6


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:05\n", 5),
        ("59:59", 3599),
        ("1:00:00", 3600),
        ("1-02:03:04", 86400 + 2 * 3600 + 184),
        ("12-00:00:00", 12 * 86400),
        ("UNLIMITED", float("inf")),
        ("INVALID", 0),
        ("NOT_SET", None),
        ("", None),
        ("x", None),
    ],
)
def test_time_left_as_squeue_prints_it(text, seconds):
    assert read_time_left(text) == seconds


def test_outside_an_allocation_nobody_is_asked(squeue, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    squeue(f"touch {tmp_path}/asked; echo 1:00")
    end = AllocationEnd({**os.environ, "SLURM_JOB_END_TIME": "1"})
    assert heard(end) is None
    assert not (tmp_path / "asked").exists()


def test_squeue_is_asked_about_this_job_and_again_after_a_minute(squeue, tmp_path):
    squeue(f'echo "$@" >> {tmp_path}/asked; echo 2:00')
    end = AllocationEnd()
    assert 119 < heard(end) <= 120
    squeue("echo 10:00")
    assert heard(end) <= 120
    end._asked_at -= 61
    assert 599 < heard(end) <= 600
    assert (tmp_path / "asked").read_text() == "-h -j 7 -o %L\n"
    squeue("echo UNLIMITED")
    end._asked_at -= 61
    assert heard(end) is None


def test_the_end_that_slurm_has_told_counts_until_it_says_another(squeue, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 500))
    squeue("echo no controller >&2; exit 1")
    assert 498 < heard(AllocationEnd()) <= 500
    squeue("echo NOT_SET")
    assert 498 < heard(AllocationEnd()) <= 500
    squeue("echo 1:00")
    assert 59 < heard(AllocationEnd()) <= 60


def test_a_controller_that_does_not_answer_holds_nothing_up(squeue):
    squeue("exec sleep 60")
    end = AllocationEnd()
    began = time.monotonic()
    assert end.left_s() is None and end.left_s() is None
    assert time.monotonic() - began < 0.5
    process = end._asked
    assert process is not None
    end._asked_at -= 21
    assert end.left_s() is None
    assert end._asked is None and process.poll() == -signal.SIGKILL


def test_halt_writes_the_file(tmp_path, capsys):
    assert main.main(["halt", str(tmp_path)]) == 64
    assert "is no run directory" in capsys.readouterr().err
    (tmp_path / "config.toml").touch()
    for arguments, content in (
        ([], "now\n"),
        (["--at-step", "12"], "step 12\n"),
        (["--at-time", "18:00"], "time 18:00\n"),
        (["--at-time", "2026-11-21T18:00:00Z"], "time 2026-11-21T18:00:00Z\n"),
    ):
        assert main.main(["halt", str(tmp_path), *arguments]) == 0
        assert (tmp_path / "halt").read_text() == content
        assert "the next start will stop" in capsys.readouterr().out
    (tmp_path / "lock.json").touch()
    assert main.main(["halt", str(tmp_path), "--at-step", "3"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: asked to stop after step 3\n"
    assert main.main(["halt", str(tmp_path), "--cancel"]) == 0
    assert not (tmp_path / "halt").exists()


@pytest.mark.parametrize(
    "arguments", [["--at-time", "soon"], ["--at-step", "-1"], ["--at-step", "x"], ["--at-step", "1", "--cancel"]]
)
def test_halt_refuses_what_the_run_would_not_understand(tmp_path, arguments, capsys):
    (tmp_path / "config.toml").touch()
    assert main.main(["halt", str(tmp_path), *arguments]) == 64
    assert not (tmp_path / "halt").exists()
