"""One private Slurm for all tests here, one small model, and one run of it that nobody disturbed."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import slurm_cluster, slurm_packages
from support.commands import run
from support.runs import Runs
from support.slurm_cluster import Cluster
from support.slurm_config import Shape
from support.slurm_desk import Desk

HERE = Path(__file__).parent
STEPS = 40
CONFIG = f"""\
[model]
layers = 5
width = 32
heads = 2
context = 24
[data]
file = "{{tokens}}"
validation_fraction = 0.1
validation_samples = 10
[parallel]
microbatches = 4
microbatch_size = 2
[train]
steps = {STEPS}
decay_steps = {STEPS}
warmup_steps = 5
learning_rate = 3e-3
sample_tokens = 0
[checkpoint]
every = 10
"""
WORDS = ("stage", "rank", "microbatch", "schedule", "bubble", "stash", "forward", "backward", "gradient", "weight")
COMPILE_LIMIT_S = 400.0


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test here."""
    if item.path.is_relative_to(HERE):
        item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Bring up a Slurm of three nodes of eight processors."""
    slurm_packages.require()
    if not slurm_cluster.has_network():
        slurm_packages.leave("mpirun reaches other nodes only where there is a network interface beside the loopback")
    with slurm_cluster.running(Shape()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the shared configuration and its token file."""
    root = tmp_path_factory.mktemp("slurm-data")
    numbers = random.Random(3)
    (root / "documents").mkdir()
    for index in range(120):
        sentences = [" ".join(numbers.choices(WORDS, k=numbers.randint(4, 9))) for _ in range(numbers.randint(2, 9))]
        (root / f"documents/{index:03d}.txt").write_text(". ".join(sentences) + ".\n")
    finished = run(["data", "prepare", root / "documents", "-o", root / "tokens.h5"], root / "output")
    assert finished.code == 0, finished.stderr
    path = root / "small.toml"
    path.write_text(CONFIG.format(tokens=root / "tokens.h5"))
    return path


@pytest.fixture(scope="session")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two stages without Slurm and without a stop; the kernels are compiled afterwards."""
    runs = Runs(tmp_path_factory.mktemp("undisturbed"), config)
    finished = runs.train("run", 2, limit_s=COMPILE_LIMIT_S)
    assert finished.code == 0, finished.stderr
    return runs.directory("run")


@pytest.fixture
def desk(slurm: Cluster, config: Path, undisturbed: Path, tmp_path: Path) -> Iterator[Desk]:
    """Give a test a place to submit from, and a cluster in good order."""
    slurm.heal()
    yield Desk(slurm, tmp_path, config)
