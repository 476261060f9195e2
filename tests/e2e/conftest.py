"""What the end-to-end tests share: one token file, one configuration, one finished run to start from."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import run
from support.runs import Runs

CONFIG = """\
[model]
layers = 5
width = 32
heads = 2
context = 24
[data]
file = "{tokens}"
validation_fraction = 0.1
validation_samples = 10
[parallel]
microbatches = 4
microbatch_size = 2
[train]
steps = 20
decay_steps = 20
warmup_steps = 5
learning_rate = 3e-3
sample_tokens = 0
[checkpoint]
every = 10
when_busy = "wait"
"""
COMPILE_LIMIT_S = 400.0
WORDS = [
    "stage",
    "rank",
    "microbatch",
    "schedule",
    "bubble",
    "stash",
    "forward",
    "backward",
    "gradient",
    "weight",
    "loss",
    "step",
    "tensor",
    "token",
]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a token file from a folder of generated text."""
    root = tmp_path_factory.mktemp("text")
    folder, path = root / "documents", root / "tokens.h5"
    folder.mkdir()
    numbers = random.Random(2)
    for index in range(120):
        sentences = [" ".join(numbers.choices(WORDS, k=numbers.randint(4, 9))) for _ in range(numbers.randint(2, 9))]
        (folder / f"{index:03d}.txt").write_text(". ".join(sentences) + ".\n")
    finished = run(["data", "prepare", folder, "-o", path], root / "output")
    assert finished.code == 0, finished.stderr
    return path


@pytest.fixture(scope="session")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the shared configuration; the kernels are compiled when it is returned."""
    root = tmp_path_factory.mktemp("config")
    path = root / "tiny.toml"
    path.write_text(CONFIG.format(tokens=tokens))
    Runs(root, path).train("warm", 1, "train.steps=1", limit_s=COMPILE_LIMIT_S)
    return path


@pytest.fixture
def runs(config: Path, tmp_path: Path) -> Runs:
    """Give a test its own directory of runs."""
    return Runs(tmp_path, config)


@pytest.fixture(scope="session")
def finished_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once on two stages, checkpoints of steps 5, 10, 15 and 20; only to be copied and read."""
    return Runs(tmp_path_factory.mktemp("finished"), config).train_well(
        "run", 2, "checkpoint.every=5", "checkpoint.keep=0"
    )


@pytest.fixture
def copy_of_finished(finished_run: Path, runs: Runs) -> Callable[[str], Path]:
    """Return a function that gives a run the state of the finished one."""

    def copy(name: str) -> Path:
        return shutil.copytree(finished_run, runs.directory(name))

    return copy
