"""Debian's packages of Slurm: installed where that is allowed, else the reason why the tests cannot run."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

PACKAGES = ("slurm-wlm", "munge", "libpmix2")
PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sinfo", "sbatch", "srun", "scancel", "scontrol", "squeue")
REQUIRE = "HPCPIPE_REQUIRE_SLURM"
"""Variable that turns a skip into a failure, where the caller knows that Slurm can be had."""

_PMIX = Path(f"/usr/lib/{platform.machine()}-linux-gnu/pmix2/lib")
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_APT_LIMIT_S = 180


def require() -> None:
    """See that Slurm's programs are there, or leave the test, see `leave`."""
    reason = provide()
    if reason:
        leave(reason)


def leave(reason: str) -> NoReturn:
    """Skip the test, or fail where `REQUIRE` is 1."""
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{reason} ({REQUIRE}=1 does not allow to skip)", pytrace=False)
    pytest.skip(reason)


def provide() -> str:
    """Install Slurm if need be; return why it cannot be used, or an empty string."""
    _extend_path()
    if _missing():
        trouble = _install()
        if trouble:
            return trouble
    if _missing():
        return f"Slurm's programs {', '.join(_missing())} are missing; install {' '.join(PACKAGES)}"
    _link_pmix()
    return ""


def _extend_path() -> None:
    """Let ordinary users find daemons."""
    known = os.environ.get("PATH", "").split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*known, *(folder for folder in _SYSTEM_FOLDERS if folder not in known)])


def _missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _install() -> str:
    wanted = f"Slurm is not installed; as root: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return wanted
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    trouble = ""
    for command in (install, ["apt-get", "update"], install):
        try:
            result = subprocess.run(
                command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_APT_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return f"{wanted} (no answer within {_APT_LIMIT_S} s)"
        if result.returncode == 0 and command is install:
            return ""
        trouble = next(iter(reversed(result.stderr.strip().splitlines())), "")
    return f"{wanted} ({trouble})"


def has_pmix() -> bool:
    """Tell whether ``srun --mpi=pmix`` finds its library."""
    return (_PMIX / "libpmix.so").exists()


def _link_pmix() -> None:
    """Make the link that Debian ships in ``libpmix-dev`` only, and that Slurm's plugin opens by its full name."""
    if (_PMIX / "libpmix.so.2").exists() and not has_pmix() and os.access(_PMIX, os.W_OK):
        (_PMIX / "libpmix.so").symlink_to("libpmix.so.2")
