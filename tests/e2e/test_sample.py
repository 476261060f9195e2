"""`hpcpipe sample`: text from a run, the same for a seed."""

from pathlib import Path

import pytest
from support.runs import Runs


def sample(runs: Runs, *words: object) -> str:
    finished = runs.hpcpipe("sample", *words)
    assert finished.code == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


def test_the_same_seed_gives_the_same_text(runs: Runs, finished_run: Path) -> None:
    words = ("--prompt", "stage rank ", "--tokens", 60, "--temperature", 0.9)
    first = sample(runs, finished_run, *words, "--seed", 3)
    assert first.startswith("stage rank ")
    assert sample(runs, finished_run / "checkpoints/step-00000020", *words, "--seed", 3) == first
    assert sample(runs, finished_run, *words, "--seed", 4) != first
    assert sample(runs, finished_run / "checkpoints/step-00000005", *words, "--seed", 3) != first


def test_temperature_zero_has_no_chance(runs: Runs, finished_run: Path) -> None:
    texts = {sample(runs, finished_run, "--tokens", 30, "--temperature", 0, "--seed", seed) for seed in (1, 2)}
    assert len(texts) == 1


def test_no_tokens_gives_the_prompt(runs: Runs, finished_run: Path) -> None:
    assert sample(runs, finished_run, "--prompt", "für α", "--tokens", 0) == "für α\n"


def test_the_newest_sound_checkpoint_is_taken(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    words = ("--tokens", 40, "--seed", 5)
    before = sample(runs, directory / "checkpoints/step-00000015", *words)
    flip(directory / "checkpoints/step-00000020/rank-0001.h5")
    assert sample(runs, directory, *words) == before
    finished = runs.hpcpipe("sample", directory / "checkpoints/step-00000020", *words)
    assert finished.code == 65
    assert finished.stdout == ""
    (message,) = finished.messages
    assert "step-00000020" in message


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (("{run}", "--tokens", "-1"), 64, ("--tokens -1",)),
        (("{run}", "--tokens", "many"), 64, ("--tokens", "many")),
        (("{run}", "--temperature", "-0.5"), 64, ("--temperature -0.5",)),
        (("{run}", "--temperature", "nan"), 64, ("--temperature nan",)),
        (("{run}/nowhere",), 64, ("nowhere", "no such directory")),
        (("{run}/checkpoints/step-00000020/rank-0000.h5",), 64, ("rank-0000.h5",)),
        (("{empty}",), 65, ("holds no checkpoint",)),
        ((), 64, ("CHECKPOINT",)),
    ],
)
def test_bad_arguments(runs: Runs, finished_run: Path, words, code: int, parts: tuple[str, ...]) -> None:
    finished = runs.hpcpipe("sample", *(word.format(run=finished_run, empty=runs.root) for word in words))
    assert finished.code == code, finished.stderr
    (message,) = finished.messages
    for part in parts:
        assert part in message
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
