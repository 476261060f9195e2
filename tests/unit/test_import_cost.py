"""Importing the package and the command entry is cheap and brings no heavy library.

Times are processor times, best of five: wall times say more about what else the machine does.
"""

import json
import resource
import subprocess
import sys

import pytest

MEASURE = """
import json, sys, time
start = time.process_time()
import {module}
elapsed = time.process_time() - start
print(json.dumps([elapsed, sorted(sys.modules)]))
"""
HEAVY = {"numpy", "scipy", "numba", "llvmlite", "h5py", "rich", "mpi4py", "mpi4py.MPI"}


@pytest.mark.parametrize("module", ["hpcpipe", "hpcpipe.cli.main"])
def test_importing_takes_under_100_ms_and_brings_nothing_heavy(module: str) -> None:
    elapsed_s, modules = min((_import(module) for _ in range(5)), key=lambda measured: measured[0])
    assert not modules & HEAVY
    assert elapsed_s < 0.1


def test_help_takes_under_150_ms() -> None:
    assert min(_processor_time_s("-m", "hpcpipe", "--help") for _ in range(5)) < 0.15


def _import(module: str) -> tuple[float, set[str]]:
    command = [sys.executable, "-c", MEASURE.format(module=module)]
    elapsed_s, modules = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return elapsed_s, set(modules)


def _processor_time_s(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
