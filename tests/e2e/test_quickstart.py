"""The README's first run, as it stands there."""

import shutil
import tomllib
from pathlib import Path

import pytest
from support.commands import HPCPIPE, rows, run, status

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.toml"
HELD_OUT_LOSS = 2.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_learns(tmp_path: Path) -> None:
    shutil.copytree(QUICKSTART.parent, tmp_path / "configs")
    words = [shutil.which("env"), "-C", tmp_path, HPCPIPE, "launch", "-n", 2, "train", "configs/quickstart.toml"]
    finished = run(words, tmp_path / "output", limit_s=1500)
    assert finished.code == 0, finished.stderr
    directory = tmp_path / "runs/quickstart"
    assert status(directory)["state"] == "done"
    train = tomllib.loads(QUICKSTART.read_text())["train"]
    evaluated = [row["step"] for row in rows(directory) if "val_loss" in row]
    assert evaluated == list(range(train["eval_every"], train["steps"] + 1, train["eval_every"]))
    assert float(rows(directory)[-1]["val_loss"]) <= HELD_OUT_LOSS
    for part in ("held-out loss", "gzip -9", "xz -9", "a sample at temperature"):
        assert part in finished.stdout
