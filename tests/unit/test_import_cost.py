"""Importing the package and the command entry is cheap and brings no heavy library."""

import json
import subprocess
import sys
import time

import pytest

MEASURE = """
import json, sys, time
start = time.perf_counter()
import {module}
elapsed = time.perf_counter() - start
print(json.dumps([elapsed, sorted(sys.modules)]))
"""
HEAVY = {"numpy", "scipy", "numba", "llvmlite", "h5py", "rich", "mpi4py", "mpi4py.MPI"}


def measure(module: str) -> tuple[float, set[str]]:
    command = [sys.executable, "-c", MEASURE.format(module=module)]
    result = subprocess.run(command, capture_output=True, check=True, timeout=60)
    elapsed_s, modules = json.loads(result.stdout)
    return elapsed_s, set(modules)


@pytest.mark.parametrize("module", ["hpcpipe", "hpcpipe.cli.main"])
def test_importing_takes_under_100_ms_and_nothing_heavy(module: str) -> None:
    elapsed_s, modules = min((measure(module) for _ in range(5)), key=lambda measured: measured[0])
    assert not modules & HEAVY
    assert elapsed_s < 0.1


def test_help_takes_under_150_ms() -> None:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "hpcpipe", "--help"], stdout=subprocess.DEVNULL, check=True, timeout=60)
        return time.perf_counter() - start

    # The interpreter's own start depends on the machine and on what site packages do; only ours is limited.
    bare_s = min(_bare_start_s() for _ in range(5))
    assert min(once() for _ in range(5)) < bare_s + 0.15


def _bare_start_s() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", ""], check=True, timeout=60)
    return time.perf_counter() - start
