"""The batch script, with a stand-in for `hpcpipe`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
SCRIPT = SLURM / "train.sbatch"
FILES = [SCRIPT, *sorted((SLURM / "machines").glob("*.env"))]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    machine = tmp_path / "site.env"
    machine.write_text(f'setup_environment() {{ export PATH="{tmp_path}:$PATH"; }}\nMPIRUN_ARGS=(--mca pml ucx)\n')
    return {
        "PATH": os.environ["PATH"],
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "6",
        "SLURMD_NODENAME": "n1",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "HPCPIPE_MACHINE": str(machine),
    }


# The decisions are those of tests/unit/test_batch.py; here they come from the variable VERDICTS, one for each attempt.
DECISIONS = """
if [ "$1" = batch ]; then
    printf '%s\\n' "$*" >>"{folder}/asked"
    case $2 in
    begin) [ -z "${{BEGIN_CODE:-}}" ] || exit "$BEGIN_CODE"; printf 'launch\\0train\\0a b\\0' ;;
    end)
        number=$(cat "{folder}/number" 2>/dev/null || echo 1)
        echo $((number + 1)) >"{folder}/number"
        echo "${{VERDICTS:-end 0}}" | cut -d, -f"$number"
        ;;
    esac
    exit 0
fi
"""


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def stand_in(folder: Path, body: str) -> None:
    program(folder, "hpcpipe", DECISIONS.format(folder=folder) + body)


def slurm_command(folder: Path, name: str, body: str = "") -> None:
    """Let a command of Slurm note that it was called."""
    program(folder, name, f'printf "%s " {name} "$@" >>{folder}/called; echo >>{folder}/called\n{body}')


def called(folder: Path) -> list[str]:
    path = folder / "called"
    return [line.rstrip() for line in path.read_text().splitlines()] if path.exists() else []


def submit(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environ, capture_output=True, text=True, timeout=30)


def test_facts_of_the_job_reach_the_decisions_and_their_words_the_command(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    stand_in(tmp_path, 'printf "%s|" "$@"')
    environ |= {"SLURM_CPUS_PER_TASK": "4", "HPCPIPE_SPARES": "2", "HPCPIPE_SPARE_NODES": "1"}
    environ["HPCPIPE_RECOVERY"] = "on"
    result = submit(environ | {"HPCPIPE_MAX_IDLE_RESTARTS": "5"}, "c.toml", "--set", "run.name=x")
    assert result.returncode == 0
    assert "launch|train|a b|" in result.stdout
    facts = "--job 7 --ranks 6 --cpus 4 --spare-nodes 1 --spares 2 --recovery on --max-idle 5"
    site = "--mpirun-arg=--mca --mpirun-arg=pml --mpirun-arg=ucx"
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"batch begin {facts} {site} c.toml --set run.name=x",
        f"batch end {facts} {site} --code 0 c.toml --set run.name=x",
    ]


def test_a_task_of_an_array_is_named_as_such(tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, "exit 75")
    slurm_command(tmp_path, "scontrol", "exit 1")
    environ |= {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2", "VERDICTS": "requeue 75"}
    assert submit(environ, "c.toml").returncode == 75
    assert called(tmp_path) == ["scontrol requeue 5_2"]
    assert "--job 5_2" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("code", [0, 64, 71, 75])
def test_an_end_has_the_code_of_the_run(code: int, tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, f"exit {code}")
    slurm_command(tmp_path, "scontrol")
    result = submit(environ | {"VERDICTS": f"end {code}"}, "c.toml")
    assert result.returncode == code
    assert (f"exit code {code}" in result.stderr) == (code in (64, 71))
    assert called(tmp_path) == []
    assert f"--code {code} " in (tmp_path / "asked").read_text()


def test_a_refusal_to_begin_ends_the_job(tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, "echo launched")
    result = submit(environ | {"BEGIN_CODE": "74"}, "c.toml")
    assert result.returncode == 74
    assert "launched" not in result.stdout


def test_ranks_start_again_in_the_allocation(tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, "echo launched; exit 71")
    result = submit(environ | {"VERDICTS": "relaunch 71,relaunch 71,end 71"}, "c.toml")
    assert result.returncode == 71
    assert result.stdout.count("launched") == 3


def test_after_a_requeue_slurm_ends_the_script(tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, "exit 75")
    slurm_command(tmp_path, "scontrol", "(sleep 0.5; kill -TERM $PPID) &")
    begun = time.monotonic()
    result = submit(environ | {"VERDICTS": "requeue 75"}, "c.toml")
    assert result.returncode == 75
    assert 0.4 < time.monotonic() - begun < 10
    assert called(tmp_path) == ["scontrol requeue 7"]


@pytest.mark.parametrize("chain", ["", "1"])
def test_a_site_that_forbids_requeueing(tmp_path: Path, environ: dict[str, str], chain: str) -> None:
    stand_in(tmp_path, "exit 75")
    slurm_command(tmp_path, "scontrol", "exit 1")
    slurm_command(tmp_path, "squeue", "echo 1:00:00")
    slurm_command(
        tmp_path, "sbatch", f'env | grep -E "^(SLURM_RESTART|SLURM_ARRAY|HPCPIPE_CHAINED)" >{tmp_path}/passed'
    )
    environ |= {"SLURM_JOB_NAME": "hpcpipe", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_PARTITION": "main"}
    environ |= {"SLURM_RESTART_COUNT": "1", "VERDICTS": "requeue 75", "HPCPIPE_CHAIN_OPTIONS": "--mem=1G --exclusive"}
    result = submit(environ | ({"HPCPIPE_CHAIN": chain} if chain else {}), "c.toml", "--set", "a.b=1 2")
    assert result.returncode == 75
    assert called(tmp_path)[0] == "scontrol requeue 7"
    if chain:
        assert called(tmp_path)[2] == (
            f"sbatch --dependency=afterany:7 --job-name=hpcpipe --chdir={tmp_path} --nodes=3 --time=1:00:00"
            f" --ntasks-per-node=2 --partition=main --mem=1G --exclusive {SCRIPT} c.toml --set a.b=1 2"
        )
        assert (tmp_path / "passed").read_text() == "HPCPIPE_CHAINED_JOB=7\n"
    else:
        assert len(called(tmp_path)) == 1
        assert "submit the same job again" in result.stdout


def test_a_job_that_must_not_requeue_itself(tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, "exit 75")
    slurm_command(tmp_path, "scontrol")
    assert submit(environ | {"VERDICTS": "requeue 75", "HPCPIPE_REQUEUE": "0"}, "c.toml").returncode == 75
    assert called(tmp_path) == []


def start(environ: dict[str, str], ready: Path) -> subprocess.Popen[bytes]:
    job = subprocess.Popen(["bash", str(SCRIPT), "c.toml"], env=environ, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 10
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return job


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_reaches_launch_and_its_code_comes_back(
    number: signal.Signals, tmp_path: Path, environ: dict[str, str]
) -> None:
    ready = tmp_path / "ready"
    stand_in(tmp_path, f"trap 'sleep 0.3; exit 75' USR1; touch {ready}; while :; do sleep 0.05; done")
    job = start(environ | {"VERDICTS": "end 75"}, ready)
    job.send_signal(number)
    job.communicate(timeout=10)
    assert job.returncode == 75
    assert "--code 75 --warned " in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("state", "expected"),
    [("RUNNING None", True), ("COMPLETING TimeLimit", True), ("COMPLETING None", False), ("", False)],
)
def test_after_term_a_job_that_runs_or_ran_out_of_time_is_requeued(
    tmp_path: Path, environ: dict[str, str], state: str, expected: bool
) -> None:
    """A job that was cancelled, or is being requeued by Slurm, must stay so."""
    ready = tmp_path / "ready"
    stand_in(tmp_path, f"trap 'exit 75' USR1; touch {ready}; while :; do sleep 0.05; done")
    slurm_command(tmp_path, "squeue", f"echo {state}")
    slurm_command(tmp_path, "scontrol", "exit 1")
    job = start(environ | {"VERDICTS": "requeue 75"}, ready)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=10)
    assert job.returncode == 75
    assert ("scontrol requeue 7" in called(tmp_path)) is expected


def test_no_attempt_begins_after_a_warning(tmp_path: Path, environ: dict[str, str]) -> None:
    ready = tmp_path / "ready"
    stand_in(tmp_path, f"trap 'exit 71' USR1; touch {ready}; while :; do sleep 0.05; done")
    slurm_command(tmp_path, "scontrol", "exit 1")
    job = start(environ | {"VERDICTS": "relaunch 71,end 0"}, ready)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=10)
    assert job.returncode == 71
    assert called(tmp_path) == ["scontrol requeue 7"]


def test_a_run_that_does_not_stop_is_killed_in_time(tmp_path: Path, environ: dict[str, str]) -> None:
    ready = tmp_path / "ready"
    # As hpcpipe launch does, and no shell can: catch what a background command starts with ignored.
    (tmp_path / "stubborn.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGQUIT, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    stand_in(tmp_path, f"exec {sys.executable} {tmp_path}/stubborn.py")
    job = start(environ | {"HPCPIPE_STOP_LIMIT": "1", "VERDICTS": "end 75"}, ready)
    begun = time.monotonic()
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=15)
    assert job.returncode == 75
    assert time.monotonic() - begun > 0.9


def test_a_killed_launch_is_told_as_such(tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, "kill -9 $$")
    submit(environ | {"VERDICTS": "end 71"}, "c.toml")
    assert "--code 137 " in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({}, [], "no configuration"),
        ({"SLURM_JOB_ID": ""}, ["c.toml"], "submit this file with sbatch"),
        ({"SLURM_NTASKS": ""}, ["c.toml"], "--ntasks-per-node"),
        ({"HPCPIPE_MACHINE": "moon"}, ["c.toml"], "slurm/machines/moon.env: no such file"),
        ({}, ["c.toml"], "no hpcpipe on PATH"),
    ],
)
def test_what_is_missing_is_named(
    change: dict[str, str], arguments: list[str], words: str, environ: dict[str, str]
) -> None:
    result = submit({**environ, "PATH": "/usr/bin:/bin", **change}, *arguments)
    assert result.returncode == 64
    assert words in result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shellcheck(path: Path) -> None:
    result = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, timeout=60)
    assert result.stdout == ""
