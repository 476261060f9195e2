"""What is read from /proc, /sys and the launcher's variables, on made-up machines."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcpipe.cluster import environment, processor, slurm

GIB = 2**30


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


@pytest.mark.usefixtures("affinity")
def test_without_a_control_group_every_allowed_core_counts(tmp_path: Path) -> None:
    assert processor.num_cores(tmp_path) == 8
    assert processor.cpu_quota(tmp_path) is None


@pytest.mark.usefixtures("affinity")
@pytest.mark.parametrize(("quota", "cores"), [("250000 100000", 3), ("10000 100000", 1), ("max 100000", 8)])
def test_unified_quota(tmp_path: Path, quota: str, cores: int) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/jobs/one\n")
    write(tmp_path, "sys/fs/cgroup/jobs/cpu.max", quota)
    write(tmp_path, "sys/fs/cgroup/jobs/one/cpu.max", "max 100000")
    assert processor.num_cores(tmp_path) == cores


@pytest.mark.usefixtures("affinity")
def test_the_smallest_quota_of_the_ancestors_holds(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "sys/fs/cgroup/a/cpu.max", "200000 100000")
    write(tmp_path, "sys/fs/cgroup/a/b/cpu.max", "600000 100000")
    assert processor.cpu_quota(tmp_path) == 2.0


@pytest.mark.usefixtures("affinity")
def test_quota_of_a_separate_cpu_controller(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/m\n1:cpu,cpuacct:/c\n0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory/m/cpu.cfs_quota_us", "1")
    write(tmp_path, "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us", "400000")
    write(tmp_path, "sys/fs/cgroup/cpu/c/cpu.cfs_period_us", "100000")
    # The kernel offers "cpu" as a link where controllers are mounted together.
    assert processor.cpu_quota(tmp_path) == 4.0
    write(tmp_path, "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us", "-1")
    assert processor.cpu_quota(tmp_path) is None


@pytest.mark.usefixtures("affinity")
def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    for cpu in range(8):
        name = f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        write(tmp_path, name, f"{cpu % 4},{cpu % 4 + 4}\n")
    assert processor.num_physical_cores(tmp_path) == 4
    assert processor.num_cores(tmp_path) == 8


def test_features_in_a_fixed_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        "proc/cpuinfo",
        "processor : 0\nmodel name\t: Some CPU: 3.0 GHz\n"
        "flags\t\t: fpu amx_tile fma avx512f avx2 amx_bf16 avx512_bf16\n\n"
        "processor : 1\nflags : fpu\n",
    )
    assert processor.features(tmp_path) == ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
    assert processor.model_name(tmp_path) == "Some CPU: 3.0 GHz"


def test_an_unknown_processor_has_no_features(tmp_path: Path) -> None:
    assert processor.features(tmp_path) == ()
    assert processor.model_name(tmp_path) == os.uname().machine


def test_memory_is_limited_by_the_control_group(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {48 * 2**20} kB\n")
    assert processor.memory(tmp_path) == processor.Memory(64 * GIB, 48 * GIB)
    write(tmp_path, "proc/self/cgroup", "0::/job\n")
    write(tmp_path, "sys/fs/cgroup/job/memory.max", str(8 * GIB))
    write(tmp_path, "sys/fs/cgroup/job/memory.current", str(3 * GIB))
    assert processor.memory(tmp_path) == processor.Memory(8 * GIB, 5 * GIB)
    write(tmp_path, "sys/fs/cgroup/job/memory.max", "max")
    assert processor.memory(tmp_path).total_bytes == 64 * GIB


def test_this_machine_is_readable() -> None:
    memory = processor.memory()
    assert 1 <= processor.num_physical_cores() <= processor.num_cores() <= (os.cpu_count() or 1)
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_slurm_outside_and_inside_an_allocation() -> None:
    assert slurm.allocation({"PATH": "/bin"}) is None
    environ = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_TASKS_PER_NODE": "4(x2),7",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_JOB_CPUS_PER_NODE": "16(x2),12",
    }
    assert slurm.allocation(environ) == slurm.Allocation(17, 3, "n[1-3]", 7, 2, 12)
    assert slurm.allocation({"SLURM_JOB_ID": "17"}) == slurm.Allocation(17, 1, "", None, 0)


def test_slurm_variables_that_are_no_numbers_count_as_missing() -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "x", "SLURM_JOB_NUM_NODES": "-", "SLURM_NNODES": "3"}
    found = slurm.allocation(environ)
    assert found is not None
    assert (found.restart_count, found.num_nodes) == (0, 3)
    assert slurm.task({"SLURM_NTASKS": "2", "SLURM_PROCID": "x", "SLURM_LOCALID": "0"}) is None


def test_only_one_module_reads_slurm_variables() -> None:
    room = Path(slurm.__file__).parents[1]
    readers = {str(path.relative_to(room)) for path in room.rglob("*.py") if '"SLURM_' in path.read_text()}
    assert readers == {"cluster/slurm.py"}


@pytest.mark.parametrize(
    ("environ", "hint"),
    [
        ({}, None),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            (3, 8, 1),
        ),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, None),
        ({"PMIX_RANK": "2", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (2, 4, 0)),
        ({"PMI_RANK": "5", "PMI_SIZE": "6", "MPI_LOCALRANKID": "5"}, (5, 6, 5)),
    ],
)
def test_rank_hint(environ: dict[str, str], hint: tuple[int, int, int] | None) -> None:
    assert environment.rank_hint(environ) == hint


@pytest.mark.parametrize(("text", "size"), [("120x40", (120, 40)), ("", None), ("120", None), ("ax40", None)])
def test_terminal_size(text: str, size: tuple[int, int] | None) -> None:
    assert environment.terminal_size({"HPCPIPE_TERMINAL": text}) == size


def test_blas_threads_are_overridden() -> None:
    environ = {"OMP_NUM_THREADS": "16", "HOME": "/"}
    environment.limit_blas_threads(2, environ)
    assert environ.pop("HOME") == "/"
    assert set(environ.values()) == {"2"}
    assert {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"} <= set(environ)


def test_a_rank_dies_with_its_launcher() -> None:
    child = (
        "import time; from hpcpipe.cluster.environment import die_with_parent; die_with_parent();"
        "print('ready', flush=True); time.sleep(30)"
    )
    parent = (
        "import subprocess, sys, os;"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE); p.stdout.readline();"
        "print(p.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    environ = {**os.environ, "OMPI_COMM_WORLD_RANK": "0"}
    result = subprocess.run([sys.executable, "-c", parent], env=environ, capture_output=True, timeout=20)
    assert result.returncode == -9
    state = Path(f"/proc/{int(result.stdout)}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline, "the child has outlived its parent"
        time.sleep(0.02)
