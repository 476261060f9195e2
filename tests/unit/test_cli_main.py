"""The command entry: exit codes, messages, and who prints them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import hpcpipe
from hpcpipe.cli import launch, main
from hpcpipe.cli.doctor import as_text
from hpcpipe.cli.preflight import check_start
from hpcpipe.cluster.banner import Failure
from hpcpipe.cluster.holder import process_start, this_process
from hpcpipe.cluster.supervise import Outcome
from hpcpipe.errors import DamagedError, RankError, StoppedError, UsageError

Captured = pytest.CaptureFixture[str]


def test_version(capsys: Captured) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hpcpipe {hpcpipe.__version__}\n"


def test_without_arguments_the_help_is_shown(capsys: Captured) -> None:
    assert main.main([]) == 64
    assert "launch" in capsys.readouterr().out


def test_help_lists_every_verb_and_exit_code(capsys: Captured) -> None:
    assert main.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("launch", "train", "data", "checkpoint", "sample", "doctor", "71", "75"):
        assert word in shown


@pytest.mark.parametrize("verb", ["launch", "train", "data", "checkpoint", "sample", "doctor"])
def test_every_verb_has_help(verb: str, capsys: Captured) -> None:
    assert main.main([verb, "--help"]) == 0
    assert f"usage: hpcpipe {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["data"], ["schedule"], ["checkpoint"], ["checkpoint", "diff"], ["bench"]])
def test_descriptions_fit_the_terminal_and_have_no_markup(
    words: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "``" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_time_to_halt_that_is_none(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "config.toml").touch()
    assert main.main(["halt", str(tmp_path), "--at-time", "25:00"]) == 64
    assert "--at-time 25:00: give a time such as 18:00 or" in capsys.readouterr().err
    assert not (tmp_path / "halt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["'trian'", "did you mean train?"]),
        (["zzz"], ["'zzz'", "verbs are launch, train"]),
        (["--vers"], ["--vers", "did you mean --version?"]),
        (["checkpoint", "shwo", "x"], ["'shwo'", "did you mean show?"]),
        (["sample", "--toknes", "5"], ["--toknes", "did you mean --tokens?"]),
        (["sample"], ["CHECKPOINT"]),
        (["launch", "train", "x.toml"], ["-n"]),
        (["launch", "-n", "two", "train"], ["'two'"]),
        (["sample", ""], ["empty path"]),
        (["train", ""], ["empty path"]),
        (["train", "x.toml", "--resume", ""], ["--resume", "empty path"]),
        (["checkpoint", "verify", ""], ["empty path"]),
        (["data", "prepare", "", "-o", "x.h5"], ["empty SOURCE"]),
        (["data", "prepare", "x", "-o", ""], ["--output", "empty path"]),
        (["launch", "-n", "0", "train", "x.toml"], ["-n 0", "at least 1"]),
        (["launch", "-n", "2", "doctor"], ["doctor", "train"]),
        (["launch", "-n", "2", "trian", "x.toml"], ["trian", "did you mean train?"]),
    ],
)
def test_usage_errors(arguments: list[str], words: list[str], capsys: Captured) -> None:
    assert main.main(arguments) == 64
    shown = capsys.readouterr()
    assert shown.err.startswith("hpcpipe: error: ")
    assert shown.err.count("hpcpipe: error:") == 1
    assert shown.out == ""
    for word in words:
        assert word in shown.err


def verb_that(raises: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def run(_: object) -> int:
        raise raises

    monkeypatch.setattr("hpcpipe.cli.doctor.run", run)
    return main.main(["doctor"])


def test_an_error_is_printed_once_with_its_code(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert verb_that(DamagedError("some.h5: truncated"), monkeypatch) == 65
    assert capsys.readouterr().err == "hpcpipe: error: some.h5: truncated\n"


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert verb_that(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == ""


def test_other_ranks_wait_for_rank_0_and_then_say_who_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(main.time, "sleep", waited.append)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert verb_that(UsageError("wrong"), monkeypatch) == 64
    assert (waited, capsys.readouterr().err) == ([], "hpcpipe: error: wrong\n")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert verb_that(UsageError("wrong"), monkeypatch) == 64
    assert len(waited) == 1
    assert f"rank 3 on {os.uname().nodename}: wrong" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = (
        "import sys; from hpcpipe.cli import doctor, main;"
        "doctor.run = lambda _: print('text') or 0; sys.exit(main.main(['doctor']))"
    )
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        result = subprocess.run([sys.executable, "-c", program], stdout=closed, stderr=subprocess.PIPE, timeout=20)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_on_a_full_disk_is_one_message(unbuffered: str) -> None:
    program = (
        "import sys; from hpcpipe.cli import doctor, main;"
        "doctor.run = lambda _: print('text') or 0; sys.exit(main.main(['doctor']))"
    )
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, env=environ, timeout=20
        )
    assert result.returncode == 74
    assert result.stderr.startswith(b"hpcpipe: error: standard output could not be written (No space left on device)")
    assert result.stderr.count(b"\n") == 1


def test_closed_streams_are_no_error() -> None:
    command = f"{sys.executable} -m hpcpipe sample nowhere <&- >&- 2>&-; echo $?"
    assert subprocess.run(command, shell=True, capture_output=True, timeout=60).stdout == b"64\n"


def test_text_that_the_output_s_encoding_lacks_passes() -> None:
    program = (
        "import sys; from hpcpipe.cli import doctor, main;"
        "doctor.run = lambda _: print('caf\\xe9 \\udcff') or 0; sys.exit(main.main(['doctor']))"
    )
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environ, timeout=20)
    assert (result.returncode, result.stdout) == (0, b"caf? ?\n")


LOST = Failure(None, "node n2 was lost: its connection to mpirun broke")
KILLED = Failure(1, "on n1 was ended by signal 9 (Killed)")


def outcome(code: int, *failures: Failure, stop: bool = False, killed: bool = False, ended: bool = False) -> Outcome:
    return Outcome(code, failures, stop, killed, ended)


@pytest.mark.parametrize(
    ("ended", "status", "code"),
    [
        (outcome(0), launch.Status("done", 0), 0),
        (outcome(0), launch.Status("failed", 71), 71),
        (outcome(137, KILLED), launch.Status("stopped", 75), 75),
        (outcome(-9), launch.Status("done", 0), 0),
        (outcome(73, Failure(0, "ended with exit code 73")), None, 73),
        (outcome(74), launch.Status("running", None), 74),
    ],
)
def test_the_true_exit_code(ended: Outcome, status: launch.Status | None, code: int) -> None:
    assert launch.conclude(ended, status) == code


@pytest.mark.parametrize(
    ("ended", "status", "error", "words"),
    [
        (outcome(137, KILLED), launch.Status("running", None), RankError, "rank 1 on n1 was ended by signal 9"),
        (outcome(0), launch.Status("running", None), RankError, "mpirun ended with code 0"),
        (outcome(0), None, RankError, "mpirun ended with code 0"),
        (
            outcome(0, LOST),
            launch.Status("running", None),
            RankError,
            "node n2 was lost: .* run the same command again",
        ),
        (outcome(-15), None, RankError, "mpirun was ended by signal 15"),
        (outcome(1, stop=True), None, StoppedError, "before the first step"),
        (outcome(1, stop=True, ended=True), launch.Status("running", None), StoppedError, "before the first step"),
        (outcome(-9, killed=True), launch.Status("running", None), StoppedError, "killed at once"),
        (outcome(213), None, UsageError, "--mpirun-arg"),
    ],
)
def test_an_end_without_a_word_is_told(
    ended: Outcome, status: launch.Status | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        launch.conclude(ended, status)


def test_a_run_that_was_seen_has_written_something() -> None:
    with pytest.raises(RankError, match="mpirun ended with code 1"):
        launch.conclude(Outcome(1, (), was_asked_to_stop=True, was_killed=False, has_begun=True), None)


def test_a_cause_that_nobody_told_is_told(capsys: Captured) -> None:
    status = launch.Status("failed", 71, "rank 0: no answer for 9 s")
    assert launch.conclude(Outcome(-9, (), False, False, told=b"some warning\n"), status) == 71
    assert capsys.readouterr().err == "hpcpipe: error: rank 0: no answer for 9 s\n"
    assert launch.conclude(Outcome(71, (), False, False, told=b"hpcpipe: error: no answer\n"), status) == 71
    assert capsys.readouterr().err == ""


def test_a_terminal_without_a_size_gets_a_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert launch._terminal() == (80, 24)
    os.close(ours)


def test_only_this_launch_s_status_counts(tmp_path: Path) -> None:
    folder = tmp_path
    assert launch.read_status(None, "a") is None
    assert launch.read_status(folder, "a") is None
    for text in ("", "{", "[]", json.dumps({"launch_id": "b", "exit_code": 0, "state": "done"})):
        (folder / "status.json").write_text(text)
        assert launch.read_status(folder, "a") is None
    (folder / "status.json").write_text(json.dumps({"launch_id": "a", "exit_code": None, "state": "running"}))
    assert launch.read_status(folder, "a") == launch.Status("running", None)
    later = {"launch_id": "a", "exit_code": 64, "cause": "wrong"}
    (folder / "status.json").write_text(json.dumps({"launch_id": "b", "exit_code": 0, "later_start": later}))
    assert launch.read_status(folder, "a") == launch.Status("failed", 64, "wrong")
    assert launch.read_status(folder, "c") is None


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "c.toml"
    file.write_text(f'[run]\nname = "one"\ndir = "{tmp_path}"\n[model]\nlayers = 4\n')
    return file


def test_the_run_directory_is_found_as_train_finds_it(config: Path) -> None:
    assert check_start("train", [str(config)], 4) == config.parent / "one"
    arguments = ["--resume", "never", "--set", "run.name=two", str(config), "--set", "train.steps=3"]
    assert check_start("train", arguments, 4) == config.parent / "two"
    assert not (config.parent / "one").exists()


@pytest.mark.parametrize(
    ("num_ranks", "arguments", "words"),
    [
        (2, ["--set", "train.stpes=3"], ["train.stpes", "train.steps"]),
        (3, ["--set", "parallel.pipeline=2"], ["3 ranks", "-n 2"]),
        (10**12, [], ["model.layers = 4", "-n 4"]),
        (10**12, ["--set", "parallel.schedule=zb-v"], ["model.layers = 4", "2 on each rank", "-n 2"]),
    ],
)
def test_a_wrong_configuration_starts_no_ranks(
    num_ranks: int,
    arguments: list[str],
    words: list[str],
    config: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "launch", None)
    assert main.main(["launch", "-n", str(num_ranks), "train", str(config), *arguments]) == 64
    message = capsys.readouterr().err
    assert message.count("hpcpipe: error: ") == 1
    for word in words:
        assert word in message
    status = json.loads((config.parent / "one/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 64)
    assert status["cause"] in message


def test_a_wrong_configuration_leaves_another_run_alone(config: Path, capsys: Captured) -> None:
    (config.parent / "one").mkdir()
    holder = replace(this_process(), pid=1, process_start=process_start(1))
    (config.parent / "one/lock.json").write_bytes(holder.to_bytes())
    assert main.main(["launch", "-n", "9", "train", str(config)]) == 64
    assert not (config.parent / "one/status.json").exists()


def test_a_run_that_is_done_stays_so_when_a_later_start_is_refused(config: Path, capsys: Captured) -> None:
    (config.parent / "one").mkdir()
    (config.parent / "one/status.json").write_text('{"state": "done", "exit_code": 0}')
    assert main.main(["launch", "-n", "9", "train", str(config)]) == 64
    status = json.loads((config.parent / "one/status.json").read_text())
    assert (status["state"], status["exit_code"], status["later_start"]["exit_code"]) == ("done", 0, 64)
    assert status["later_start"]["cause"] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--unknown", "x.toml"], ["nowhere.toml"]])
def test_arguments_of_the_ranks_are_checked(arguments: list[str], capsys: Captured) -> None:
    assert main.main(["launch", "-n", "2", "train", *arguments]) == 64
    assert capsys.readouterr().err.count("hpcpipe: error: ") == 1


def test_doctor_s_text_names_problems_last() -> None:
    report = {
        "mpi": {"library": None, "version": None, "mpirun": None, "works": False},
        "cores": 3,
        "cpu": "Some CPU",
        "features": [],
        "memory_bytes": {"total_bytes": 3 * 2**30, "available_bytes": 2**30},
        "slurm": {"job_id": 7, "num_nodes": 2, "node_list": "n[1-2]"},
        "recovery": {"works": False, "seconds": None, "trouble": "there is no mpirun"},
        "versions": {"hpcpipe": "1", "numba": None},
        "kernels": None,
        "problems": ["no mpirun: install it"],
    }
    text = as_text(report)
    assert text.endswith("Problems:\n- no mpirun: install it")
    assert "job 7 on 2 nodes (n[1-2])" in text
    assert "3.0 GiB, 1.0 GiB available" in text
    assert "kernels    none that work" in text
    assert "does not work: there is no mpirun" in text


def test_doctor_s_text_names_the_family_of_kernels() -> None:
    report = {
        "mpi": {"library": "MPI", "mpirun": "/bin/mpirun", "works": True, "cores": "2 ranks with 1 thread each"},
        "cores": 3,
        "cpu": "Some CPU",
        "features": [],
        "memory_bytes": {"total_bytes": 2**30, "available_bytes": 2**30},
        "slurm": None,
        "recovery": {"works": True, "seconds": 0.054, "trouble": ""},
        "versions": {"hpcpipe": "1"},
        "kernels": {"family": "amx", "precision": "bf16", "description": "kernels for X", "compiled": False},
        "problems": [],
    }
    text = as_text(report)
    assert "kernels    kernels for X, to be compiled at the first start" in text
    assert 'family     amx; train.precision = "auto" means bf16' in text
    assert "works: ranks worked together again 54 ms after one was killed" in text
