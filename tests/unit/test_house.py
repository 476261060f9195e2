"""The package keeps the rules of its house, and the checker of the rules can tell."""

import re
import subprocess
from pathlib import Path

import pytest
from support import house
from support.house import Module, read_package

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    modules = read_package(ROOT)
    assert len(modules) > 20
    problems = rule(modules)
    assert not problems, "\n".join([rule.__doc__, *problems])


BROKEN = [
    (house.rooms, "garage/car.py", '"""x"""', "garage is on no floor"),
    (house.floors, "mpi/a.py", "import hpcpipe.train.loop", ":1: mpi must not import train"),
    (house.floors, "mpi/a.py", "from hpcpipe import train", "mpi must not import train"),
    (house.floors, "mpi/a.py", "from hpcpipe.kernels import gemm", "mpi must not import kernels"),
    (house.floors, "mpi/a.py", "def f():\n    from ..kernels.gemm import g", ":2: mpi must not import kernels"),
    (house.floors, "mpi/a.py", "import importlib\nimportlib.import_module('hpcpipe.cli.main')", "import cli"),
    (house.floors, "errors.py", "from hpcpipe.config import load", "errors must not import config"),
    (house.floors, "__init__.py", "from hpcpipe.errors import ExitCode", "__init__ must not import errors"),
    (house.floors, "train/a.py", "from hpcpipe.garage import car", "in no room"),
    (house.floors, "schedule/a.py", "from hpcpipe.config.schema import Config", "only errors, not config"),
    (house.doors, "train/a.py", "from mpi4py import MPI", "train has no door to mpi4py"),
    (house.doors, "model/a.py", "def f():\n    import numba.core", ":2: model has no door to numba"),
    (house.doors, "optim/a.py", "import h5py", "optim has no door to h5py"),
    (house.doors, "train/a.py", "import rich.progress", "train has no door to rich"),
    (house.doors, "kernels/a.py", "import pandas", "kernels has no door to pandas"),
    (house.slurm_variables, "cli/a.py", "import os\nos.environ['SLURM_JOB_ID']", ":2: SLURM_JOB_ID"),
    (house.world_communicators, "train/a.py", "def f(MPI):\n    return MPI.COMM_WORLD", "train/a.py:2"),
    (house.world_communicators, "mpi/a.py", "from mpi4py import MPI\nMPI.COMM_WORLD\nMPI.COMM_WORLD", "mpi/a.py:3"),
    (house.world_communicators, "data/a.py", "from mpi4py.MPI import COMM_WORLD as world", "data/a.py:1"),
    (house.printing, "train/a.py", "def f():\n    print('x')", "train/a.py:2: print"),
    (house.docstrings, "train/a.py", "x = 1", "train/a.py: no docstring"),
    (house.lengths, "train/a.py", "x = 1\n" * 401, "401 lines, at most 400"),
    (house.lengths, "train/a.py", "def f():\n" + "    x = 1\n" * 80, "f: 81 lines, at most 80"),
]


@pytest.mark.parametrize(("rule", "path", "text", "problem"), BROKEN)
def test_a_broken_rule_is_seen(tmp_path, rule, path, text, problem):
    file = tmp_path / "hpcpipe" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    assert problem in "\n".join(rule(read_package(tmp_path)))


KEPT = [
    ("cli/main.py", "from hpcpipe.train.loop import run\nfrom hpcpipe.errors import ExitCode\nprint('x')"),
    ("mpi/runtime.py", "import mpi4py\nfrom mpi4py import MPI\nMPI.COMM_WORLD"),
    ("mpi/grid.py", "from hpcpipe.mpi.runtime import start\nfrom . import runtime\nimport numpy as np"),
    ("cluster/slurm.py", "import os\nos.environ['SLURM_JOB_ID']"),
    ("train/step.py", "import time\nfrom hpcpipe import __version__\nfrom ..pipeline.executor import run"),
    ("schedule/check.py", "from hpcpipe.errors import UsageError\nfrom hpcpipe.schedule.action import Action"),
    ("__main__.py", "from hpcpipe.cli.main import main"),
    ("__init__.py", "__version__ = '1'"),
]


@pytest.mark.parametrize(("path", "text"), KEPT)
@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_a_kept_rule_is_left_alone(rule, path, text):
    assert rule([Module(f"hpcpipe/{path}", f'"""What it is for."""\n{text}')]) == []


def test_every_room_of_the_house_exists():
    present = {module.room for module in read_package(ROOT)}
    assert present >= set(house.FLOOR_OF)


# Assembled from parts, so that this file does not contain what it looks for.
OWN_MACHINE = re.compile(
    r"(?<![\w.$}\-/])/(" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "t" + "mp"]) + r")(/|\b)"
)


def tracked_files(root: Path) -> list[Path]:
    """List what git tracks; in an unpacked archive, what lies in the project's own folders."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listing.returncode == 0 and listing.stdout:
        return [root / name for name in listing.stdout.split("\0") if name and (root / name).is_file()]
    folders = ("hpcpipe", "tests", "docs", "seeds", "configs", "slurm")
    return [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in (".py", ".md", ".toml")]


def paths_of_one_machine(files: list[Path]) -> list[str]:
    """List lines that name a folder of somebody's own machine."""
    return [
        f"{file}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1)
        if OWN_MACHINE.search(line)
    ]


def test_no_tracked_file_knows_the_machine_it_was_written_on():
    files = tracked_files(ROOT)
    assert len(files) > 20
    problems = paths_of_one_machine(files)
    assert not problems, "\n".join(problems)


def test_paths_of_one_machine_are_seen(tmp_path):
    file = tmp_path / "a.md"
    bad = ["/".join(["", folder, "someone"]) for folder in ("home", "work", "root", "tmp")] + ["/" + "tmp"]
    good = ["a/work/b", "$HOME/x", "https://example.org/home/x", "docs/root.md", "/working"]
    file.write_text("\n".join([*bad, *good]))
    assert len(paths_of_one_machine([file])) == len(bad)
