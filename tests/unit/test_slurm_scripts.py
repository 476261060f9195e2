"""The batch script, with a stand-in for `hpcpipe`."""

import os
import shutil
import signal
import subprocess
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
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "HPCPIPE_MACHINE": str(machine),
    }


def stand_in(folder: Path, body: str) -> None:
    path = folder / "hpcpipe"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def submit(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environ, capture_output=True, text=True, timeout=30)


def test_ranks_and_options_reach_launch(tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, 'printf "%s|" "$@"')
    result = submit(environ, "c.toml", "--set", "run.name=a b")
    assert result.returncode == 0
    expected = "launch|-n|6|--mpirun-arg=--mca|--mpirun-arg=pml|--mpirun-arg=ucx|train|c.toml|--set|run.name=a b|"
    assert expected in result.stdout


@pytest.mark.parametrize("code", [0, 64, 71, 75])
def test_the_code_of_launch_is_the_job_s(code: int, tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, f"exit {code}")
    result = submit(environ, "c.toml")
    assert result.returncode == code
    assert ("submit the same job again" in result.stdout) == (code == 75)
    assert (f"exit code {code}" in result.stderr) == (code in (64, 71))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_reaches_launch_and_its_code_comes_back(
    number: signal.Signals, tmp_path: Path, environ: dict[str, str]
) -> None:
    ready = tmp_path / "ready"
    stand_in(tmp_path, f"trap 'sleep 0.3; exit 75' USR1; touch {ready}; while :; do sleep 0.05; done")
    job = subprocess.Popen(["bash", str(SCRIPT), "c.toml"], env=environ, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 10
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(number)
    job.communicate(timeout=10)
    assert job.returncode == 75


def test_a_killed_launch_is_a_failure(tmp_path: Path, environ: dict[str, str]) -> None:
    stand_in(tmp_path, "kill -9 $$")
    assert submit(environ, "c.toml").returncode == 71


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
