"""The examples of docs/file-format.md work, and what it says is what is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import make_checkpoint

from hpcpipe.checkpoint.layout import VERSION
from hpcpipe.checkpoint.manifest import load_manifest

PAGE = Path(__file__).parents[2] / "docs" / "file-format.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def path(tmp_path):
    return make_checkpoint(tmp_path / "runs" / "run" / "checkpoints", 100, 3)[0]


def run(tmp_path, example):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def test_the_page_has_the_examples_and_the_version_that_are_tested():
    assert len(EXAMPLES) == 2
    assert f"# The checkpoint format, version {VERSION}\n" in PAGE.read_text()
    assert all("hpcpipe" not in example.replace("hpcpipe-checkpoint", "") for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_the_tensor(tmp_path, path, example):
    done = run(tmp_path, example)
    assert done.returncode == 0, done.stderr
    tensor = make_checkpoint(tmp_path / "again", 100, 1)[1]["layers/003/attention/qkv/weight", "weight"]
    assert done.stdout.endswith(f"{np.array2string(tensor)}\n")


@pytest.mark.parametrize("name", ["rank-0000.h5", "rank-0002.h5", "view.h5", "manifest.json"])
def test_the_example_that_checks_every_byte_does(tmp_path, path, name):
    data = (path / name).read_bytes()
    for position in range(0, len(data), len(data) // 6):
        altered = bytearray(data)
        altered[position] ^= 2
        (path / name).write_bytes(altered)
        assert run(tmp_path, EXAMPLES[1]).returncode != 0, position


def test_the_keys_are_those_that_the_page_lists(path):
    manifest = load_manifest(path)
    text = PAGE.read_text()
    for name in (
        "format",
        "version",
        "step",
        "header",
        "files",
        "tensors",
        "view",
        "blake3",
        "metadata",
        *manifest.header,
    ):
        assert f"`{name}`" in text, name
