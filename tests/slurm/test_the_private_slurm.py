"""The private Slurm itself: a node can be switched off and on, and nothing is left whatever happens."""

import time
from pathlib import Path

import pytest
from support.slurm_cluster import Cluster, running, wait_until
from support.slurm_config import Shape


def processes_of(root: Path) -> list[str]:
    """List the command lines of processes that know a cluster's folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            known = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if str(root).encode() in known:
            found.append((folder / "cmdline").read_text())
    return found


def test_nothing_is_left_after_a_failure(slurm: Cluster) -> None:
    with pytest.raises(ZeroDivisionError), running(Shape(num_nodes=1)) as cluster:
        job = cluster.submit("--wrap", "sleep 100 & sleep 100", "--output=/dev/null")
        cluster.wait_for(job, "RUNNING")
        root = cluster.root
        assert processes_of(root)
        raise ZeroDivisionError
    wait_until(lambda: not processes_of(root), "end of all processes", lambda: str(processes_of(root)), 5)
    assert not root.exists()
    assert slurm.run("sinfo", "-h", "-o", "%P").split()


def test_a_node_that_is_off_is_found_down_and_comes_back(slurm: Cluster) -> None:
    slurm.heal()
    begun = time.monotonic()
    slurm.crash("n3")
    assert time.monotonic() - begun < 5
    slurm.run("scontrol", "update", "nodename=n3", "state=down", "reason=test")
    assert slurm.run("sinfo", "-h", "-n", "n3", "-p", "main", "-o", "%t").strip("*\n") == "down"
    slurm.heal()
    assert slurm.run("srun", "--nodelist=n3", "--mpi=none", "sh", "-c", "echo $SLURMD_NODENAME") == "n3\n"
