"""``hpcpipe doctor`` inside a job on two nodes."""

import json
import shlex
import sys

import pytest
from support import slurm_packages
from support.slurm_desk import Desk


def test_doctor_tries_both_launchers_over_the_nodes(desk: Desk) -> None:
    if not desk.cluster.shape.has_namespaces:
        pytest.skip("srun --mpi=pmix needs nodes with host names of their own")
    if not slurm_packages.has_pmix():
        slurm_packages.leave("srun --mpi=pmix needs the package libpmix2, and the link that root can make")
    words = [sys.executable, "-P", "-m", "hpcpipe", "doctor", "--json"]
    options = ("--nodes=2", "--ntasks-per-node=2", f"--output={desk.root}/report")
    job = desk.cluster.submit(*options, "--wrap", shlex.join(words), cwd=desk.root)
    ended = desk.wait_for(job)
    told = (desk.root / "report").read_text()
    assert (ended.state, ended.exit_code) == ("COMPLETED", "0:0"), told
    report = json.loads(told[told.index("{") :])
    assert report["problems"] == []
    by_mpirun, by_srun = report["mpi"]["launchers"]
    for attempt in (by_mpirun, by_srun):
        assert attempt["works"], attempt["trouble"]
        assert [(node["name"], node["ranks"]) for node in attempt["nodes"]] == [("n1", 2), ("n2", 2)]
        assert all("2 ranks with" in node["cores"] for node in attempt["nodes"])
    assert report["recovery"]["works"], report["recovery"]["trouble"]
