"""The files and the screen of a run."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpcpipe.cluster.environment import TERMINAL
from hpcpipe.errors import DiskError, ExitCode, InUseError, NumericsError
from hpcpipe.telemetry.console import Console
from hpcpipe.telemetry.events import EventLog
from hpcpipe.telemetry.files import append_line, read_lines, write_whole
from hpcpipe.telemetry.metrics import MetricsLog, last_step
from hpcpipe.telemetry.status import end_status, write_status
from hpcpipe.telemetry.text import visible

ROW = {
    "step": 7,
    "loss": 1.25,
    "grad_norm": 0.5,
    "learning_rate": 1e-3,
    "tokens": 7,
    "step_s": 2.0,
    "tokens_per_s": 12345.6,
    "mfu": 0.25,
    "bubble": 0.125,
}


def test_what_a_terminal_would_obey_is_shown_as_text():
    assert visible("a\x1b[2J\x9b1m\r\n\tß\ufffd\udcff", kept="\n\t") == "a\\x1b[2J\\x9b1m\\r\n\tß\ufffd\\udcff"
    assert visible("a\nb") == "a\\nb"


@pytest.mark.parametrize("mode", ["lines", "terminal"])
@pytest.mark.parametrize(("is_pipe", "stops"), [(True, [signal.SIGUSR1]), (False, [])])
def test_an_output_that_takes_no_text_does_not_end_the_run(monkeypatch, is_pipe, stops, mode):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with os.fdopen(writer, "w") as gone, Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", gone if is_pipe else full)
            console = Console(mode)
            console.say("lost")
            console.start(steps=100, done=0)
            console.step(ROW)
            console.say("lost as well")
            console.stop()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == stops


def test_floats_read_back_to_the_same_bits(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, math.pi]
    append_line(tmp_path / "log", {"values": values})
    assert read_lines(tmp_path / "log") == [{"values": values}]


def test_a_half_written_last_line_is_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.add({**ROW, "step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log.keep_until(4)
    log.add({**ROW, "step": 5, "loss": 9.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["loss"] == 9.0


def test_lines_that_are_no_rows_of_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = [b'{"a":1}', b"[1]", b"3", b'{"step":"4"}', b'{"step":true}', b'{"step":9,"\xff', b"[" * 100_000, b""]
    path.write_bytes(b'{"step": 1, "note": "\xff"}\n' + b"\n".join(bad) + b'\n{"step": 3}\n{"step": 2}\n')
    assert last_step(path) == 3
    MetricsLog(path).keep_until(2)
    assert [row["step"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())] == [1, 2]


def test_a_directory_in_place_of_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    with pytest.raises(DiskError, match=r"metrics\.jsonl could not be read .*choose another run\.name"):
        MetricsLog(path).keep_until(2)
    log = MetricsLog(path)
    for step in (3, 4):
        log.add({"step": step})
    assert log.num_dropped == 2
    assert "metrics.jsonl could not be written" in log.problem
    assert last_step(path) == 0


def test_half_a_line_does_not_stay(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.add({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 4, limits[1]))
        log.add({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    log.add({"step": 3})
    assert log.num_dropped == 1
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == [1, 3]


def test_no_metrics(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "metrics.jsonl", tmp_path / "file" / "metrics.jsonl"):
        MetricsLog(path).keep_until(2)
        assert last_step(path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_json_does_not_have_is_refused(tmp_path, value):
    with pytest.raises(NumericsError, match=r"'loss': (nan|inf)"):
        append_line(tmp_path / "log", {"step": 1, "loss": value})
    assert not (tmp_path / "log").exists()


def test_text_is_utf_8_whatever_the_locale_and_names_keep_their_bytes(tmp_path):
    code = "import sys; from pathlib import Path; from hpcpipe.telemetry.files import write_whole\n"
    code += "write_whole(Path(sys.argv[1]), '\\u00e9\\udcff')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "text"], env=environment, check=True)
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\xff"


def test_a_file_in_place_of_the_directory_is_a_refused_write(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(DiskError, match="could not be written"):
        write_whole(tmp_path / "run" / "status.json", "text")


def test_status(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCPIPE_LAUNCH_ID", "abc")
    expected = {None: "running", ExitCode.DONE: "done", ExitCode.STOPPED: "stopped", ExitCode.DISK: "failed"}
    for code, state in expected.items():
        write_status(tmp_path, 3, code, "because")
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status["step"], status["cause"]) == (state, 3, "because")
        assert status["exit_code"] == (None if code is None else int(code))
        assert status["launch_id"] == "abc"
        assert (status["start_step"], status["checkpoint_step"]) == (None if code is None else 3, 0)
        assert (status["stopped_by"], status["job"]) == ("", None)


def test_status_says_what_a_batch_script_decides_by(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for name in ("step-00000005", "step-00000010", "step-00000020.0123abcd.partial", "trash-step-00000030", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    write_status(tmp_path, 14, ExitCode.STOPPED, "asked", start_step=3, stopped_by="halt")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["step"], status["start_step"], status["checkpoint_step"]) == (14, 3, 10)
    assert (status["stopped_by"], status["job"]) == ("halt", {"id": 12, "restart_count": 2})


@pytest.mark.parametrize(("start_step", "expected"), [(1, 1), (None, 2)])
def test_the_end_of_a_run_keeps_where_it_began(tmp_path, monkeypatch, start_step, expected):
    monkeypatch.setenv("HPCPIPE_LAUNCH_ID", "abc")
    write_status(tmp_path, 1, None, start_step=start_step)
    MetricsLog(tmp_path / "metrics.jsonl").add({**ROW, "step": 2})
    (tmp_path / "checkpoints/step-00000002").mkdir(parents=True)
    end_status(tmp_path, "abc", ExitCode.STOPPED, "killed", "signal")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["step"], status["start_step"], status["checkpoint_step"]) == (2, expected, 2)
    assert status["stopped_by"] == "signal"


def test_nothing_is_written_that_the_guard_forbids(tmp_path):
    def forbid():
        raise InUseError("not ours")

    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    metrics, events = MetricsLog(tmp_path / "metrics.jsonl", forbid), EventLog(tmp_path / "events.jsonl", forbid)
    for write in (lambda: metrics.add(ROW), lambda: metrics.keep_until(1), lambda: events.add("x")):
        with pytest.raises(InUseError):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


def test_an_evaluation_that_a_stop_left_out_is_noticed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.add({**ROW, "step": 1})
    log.add({"step": 1, "val_loss": 2.0})
    log.add({**ROW, "step": 2})
    assert [log.lacks_evaluation(step) for step in (1, 2, 3)] == [False, True, False]


def test_the_end_of_a_run_that_could_not_write_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCPIPE_LAUNCH_ID", "abc")
    end_status(tmp_path, "abc", ExitCode.RANK_FAILED, "no file")
    assert not (tmp_path / "status.json").exists()
    write_status(tmp_path, 3, None)
    end_status(tmp_path, "another", ExitCode.RANK_FAILED, "not ours")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    end_status(tmp_path, "abc", ExitCode.RANK_FAILED, "rank 1 died")
    end_status(tmp_path, "abc", ExitCode.DONE, "too late")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 3, 71)
    assert (status["cause"], status["launch_id"]) == ("rank 1 died", "abc")


def test_the_end_of_a_run_names_the_last_step_of_its_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCPIPE_LAUNCH_ID", "abc")
    write_status(tmp_path, 0, None)
    for step in (1, 2):
        MetricsLog(tmp_path / "metrics.jsonl").add({**ROW, "step": step})
    end_status(tmp_path, "abc", ExitCode.RANK_FAILED, "rank 1 died")
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 2


def test_a_refused_write_keeps_the_earlier_file(tmp_path):
    write_whole(tmp_path / "file", "first")
    (tmp_path / "directory").mkdir()
    with pytest.raises(DiskError, match="directory could not be written"):
        write_whole(tmp_path / "directory", "second")
    with pytest.raises(DiskError):
        append_line(tmp_path / "missing" / "log", {})
    assert (tmp_path / "file").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "directory"}


def test_events_have_a_time(tmp_path):
    EventLog(tmp_path / "events.jsonl").add("resumed", step=4)
    EventLog(None).add("nothing")
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert event["event"] == "resumed" and event["step"] == 4 and event["time"].endswith("Z")


def test_one_line_per_step_without_a_terminal(capsys, monkeypatch):
    monkeypatch.delenv(TERMINAL, raising=False)
    console = Console("auto")
    console.start(steps=100, done=0)
    console.step(ROW)
    console.stop()
    (line,) = capsys.readouterr().out.splitlines()
    for part in ("step   7/100", "loss 1.2500", "12,346 tokens/s", "MFU 25%", "bubble 12%", "left 3:06"):
        assert part in line
    assert "\x1b" not in line


def test_a_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv(TERMINAL, "100x30")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    console = Console("auto")
    console.start(steps=100, done=0)
    console.step(ROW)
    console.say("[not markup] a message")
    console.stop()
    out = capsys.readouterr().out
    assert "7/100" in out and "loss 1.2500" in out and "[not markup] a message" in out and "\x1b" in out


def test_quiet_says_nothing(capsys):
    console = Console("quiet")
    console.say("text")
    console.start(10, 0)
    console.step(ROW)
    console.stop()
    assert capsys.readouterr().out == ""
