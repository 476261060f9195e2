"""What doctor says about launchers, with stand-ins for them."""

import json
from pathlib import Path

import pytest

from hpcpipe.cli import doctor, doctor_launch
from hpcpipe.cluster.slurm import Allocation

PLUGINS = "echo 'MPI plugin types are...' >&2; echo '	none\n	pmix\n	pmix_v4' >&2"
HEARD = {
    "size": 4,
    "arrived": True,
    "library": "Open MPI v5",
    "threads": 2,
    "cores": "2 ranks with 2 threads each",
    "nodes": [{"name": "n1", "ranks": 2, "cores": "on 0-3"}, {"name": "n2", "ranks": 2, "cores": "on 4-7"}],
}
ALLOCATION = Allocation(7, 2, "n[1-2]", 4, 0, 8)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    return tmp_path


def program(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def says(folder: Path, **changes: object) -> str:
    """Return the body of a launcher that notes its words and prints what rank 0 would."""
    return f"printf '%s\\n' \"$*\" >>{folder}/called; echo '{json.dumps({**HEARD, **changes})}'"


def srun(folder: Path, body: str, plugins: str = PLUGINS) -> None:
    program(folder, "srun", f'if [ "$1" = --mpi=list ]; then {plugins}; exit; fi\n{body}')


def test_both_launchers_over_all_nodes(commands: Path) -> None:
    mpirun = program(commands, "mpirun", f'[ "$SLURM_OVERLAP" = 1 ] || exit 3\n{says(commands)}')
    srun(commands, says(commands))
    tried = doctor_launch.in_allocation(mpirun, ALLOCATION)
    assert [(attempt["name"], attempt["works"]) for attempt in tried] == [("mpirun", True), ("srun --mpi=pmix", True)]
    by_mpirun, by_srun = (commands / "called").read_text().splitlines()
    assert by_mpirun.startswith("-n 4 ")
    assert "--map-by ppr:2:node" in by_mpirun
    assert by_mpirun.count("-m hpcpipe.mpi.selftest") == by_srun.count("-m hpcpipe.mpi.selftest") == 1
    assert "--mpi=pmix --overlap" in by_srun
    assert "--nodes=2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=2" in by_srun
    assert doctor_launch.describe(tried[0]) == "works on 2 nodes; n1: on 0-3; n2: on 4-7"


@pytest.mark.parametrize(
    ("body", "trouble"),
    [
        ("echo 'cannot bind to that many processors' >&2; exit 213", "cannot bind to that many processors"),
        ("exit 5", "ended with code 5"),
        (f"echo '{json.dumps({**HEARD, 'size': 1})}'", "4 ranks were started, and one sees 1"),
        (f"echo '{json.dumps({**HEARD, 'arrived': False})}'", "the message did not arrive"),
        ("exec sleep 30", "no answer within 1 s"),
    ],
)
def test_a_launcher_that_does_not_work(
    commands: Path, monkeypatch: pytest.MonkeyPatch, body: str, trouble: str
) -> None:
    monkeypatch.setattr(doctor_launch, "_ALLOCATION_LIMIT_S", 1)
    mpirun = program(commands, "mpirun", body)
    srun(commands, body)
    for attempt in doctor_launch.in_allocation(mpirun, ALLOCATION):
        assert not attempt["works"]
        assert trouble in attempt["trouble"]
        assert doctor_launch.describe(attempt).startswith("does not work: ")


@pytest.mark.parametrize(
    ("plugins", "trouble"),
    [("echo none; echo pmi2", "this Slurm has no pmix"), ("exit 1", "no answer"), ("", "no answer")],
)
def test_a_slurm_without_pmix(commands: Path, plugins: str, trouble: str) -> None:
    srun(commands, "echo never; exit 9", plugins or ":")
    (attempt,) = doctor_launch.in_allocation(None, ALLOCATION)
    assert trouble in attempt["trouble"]


def test_no_srun(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(commands))
    (attempt,) = doctor_launch.in_allocation(None, ALLOCATION)
    assert attempt["trouble"] == "no srun on PATH"


def test_many_nodes_are_summed_up() -> None:
    nodes = [{"name": f"n{index}", "ranks": 1, "cores": "on 0"} for index in range(6)]
    told = doctor_launch.describe({"works": True, "nodes": nodes})
    assert told == "works on 6 nodes; n0: on 0; n1: on 0; n2: on 0; n3: on 0; and 2 more"


def test_what_does_not_work_is_a_problem_only_where_the_batch_script_needs_it(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcpipe.cluster.launcher.find_mpirun", lambda: program(commands, "mpirun", "exit 5"))
    srun(commands, says(commands))
    problems: list[str] = []
    facts = doctor._mpi(problems, ALLOCATION)
    assert facts["works"] is True
    assert facts["library"] == "Open MPI v5"
    assert len(problems) == 1
    assert "by mpirun in this job" in problems[0]
    assert "srun --mpi=pmix works, see slurm/README.md" in problems[0]
    report = {
        "mpi": facts,
        "cores": 3,
        "cpu": "Some CPU",
        "features": [],
        "memory_bytes": {"total_bytes": 2**30, "available_bytes": 2**30},
        "slurm": {"job_id": 7, "num_nodes": 2, "node_list": "n[1-2]"},
        "recovery": {"works": False, "seconds": None, "trouble": "none"},
        "versions": {"hpcpipe": "1"},
        "kernels": None,
        "problems": problems,
    }
    text = doctor.as_text(report)
    assert "by mpirun  does not work: " in text
    assert "by srun    works on 2 nodes; n1: on 0-3; n2: on 4-7" in text
