"""What this machine computes with: cores, CPU features and memory, read from Linux."""

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# Features that decide which kernels can run, as /proc/cpuinfo writes them.
FEATURES = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimdhp",
    "sve",
    "sve2",
    "bf16",
    "i8mm",
)


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes, the limit of the control group included."""

    total_bytes: int
    available_bytes: int


def num_cores(root: Path = Path("/")) -> int:
    """Count the processors that this process may use.

    Parameters
    ----------
    root : Path
        Where ``/sys`` and ``/proc`` are found; another one only in tests.

    Returns
    -------
    int
        Size of the affinity mask, lowered to the CPU quota of the control group rounded up; at least 1.
    """
    return _within_quota(len(os.sched_getaffinity(0)), root)


def num_physical_cores(root: Path = Path("/"), processors: Collection[int] | None = None) -> int:
    """Count the cores behind the processors that this process may use.

    Parameters
    ----------
    root : Path
        As in `num_cores`.
    processors : collection of int, optional
        Count these instead of this process's own, such as those of all ranks of a node, each bound to its core.

    Returns
    -------
    int
        Hardware threads of one core count once, as `mpirun` counts its slots; `num_cores` is an upper bound.
    """
    siblings = set()
    for cpu in sorted(os.sched_getaffinity(0) if processors is None else processors):
        topology = root / "sys/devices/system/cpu" / f"cpu{cpu}" / "topology/thread_siblings_list"
        siblings.add(_read(topology) or str(cpu))
    return _within_quota(len(siblings), root)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Read the CPU quota of this process's control group.

    Parameters
    ----------
    root : Path
        As in `num_cores`.

    Returns
    -------
    float or None
        Processors' worth of time, the smallest of the group and its ancestors; None without a quota.
    """
    quotas = []
    for group in _control_groups(root, "cpu"):
        unified = (_read(group / "cpu.max") or "max").split()
        if unified[0] != "max":
            quotas.append(int(unified[0]) / int(unified[1]))
        limit, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if limit and period and int(limit) > 0:
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def model_name(root: Path = Path("/")) -> str:
    """Return the processor's name as the manufacturer writes it, or the architecture's where there is none."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


def features(root: Path = Path("/")) -> tuple[str, ...]:
    """List the CPU features that matter to kernels.

    Parameters
    ----------
    root : Path
        As in `num_cores`.

    Returns
    -------
    tuple of str
        The members of `FEATURES` that the first processor has, in that order.
    """
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            found = set(value.split())
            return tuple(feature for feature in FEATURES if feature in found)
    return ()


def memory(root: Path = Path("/")) -> Memory:
    """Read how much main memory there is.

    Parameters
    ----------
    root : Path
        As in `num_cores`.

    Returns
    -------
    Memory
        The machine's memory, or the control group's limit and what is left below it where these are smaller.
    """
    rows = dict(line.split(":", 1) for line in (_read(root / "proc/meminfo") or "").splitlines() if ":" in line)
    total, available = (int(rows.get(key, "0").split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    for group in _control_groups(root, "memory"):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read(group / limit_name)
            if limit and limit.isdigit() and int(limit) < total:
                total = int(limit)
                available = min(available, max(0, total - int(_read(group / usage_name) or "0")))
    return Memory(total, available)


def _within_quota(count: int, root: Path) -> int:
    """Lower a number of processors to the CPU quota rounded up, and to no less than 1."""
    quota = cpu_quota(root)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _control_groups(root: Path, controller: str) -> list[Path]:
    """List the folders of this process's control group and its ancestors, in both versions' layouts."""
    groups = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = base / path.lstrip("/")
        groups += [folder for folder in (group, *group.parents) if folder == base or base in folder.parents]
    return groups


def _read(path: Path) -> str | None:
    """Return a small file's text without its end, or None where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
