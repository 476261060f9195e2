"""The configurations that come with the package: each is valid, and says what each of its keys does."""

import re
from pathlib import Path

import pytest

from hpcpipe.config.check import resolve
from hpcpipe.config.load import load

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.toml"))
KEY = re.compile(r"^\w[\w-]*\s*=")


def keys_without_comment(text: str) -> list[str]:
    lines = text.splitlines()
    above = ["", *lines]
    return [
        line
        for line, before in zip(lines, above, strict=False)
        if KEY.match(line) and "#" not in line and not before.startswith("#")
    ]


def test_there_are_configurations():
    assert {path.name for path in CONFIGS} >= {"quickstart.toml", "gpt2-124m.toml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_resolves_for_a_fitting_number_of_ranks(path):
    config = load(path)
    world_size = (config.parallel.pipeline or 2) * config.parallel.data
    assert resolve(config, world_size).parallel.pipeline * config.parallel.data == world_size


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_key_has_a_comment(path):
    assert keys_without_comment(path.read_text()) == []


def test_a_key_without_comment_is_seen():
    assert keys_without_comment("a = 1 # x\n# y\nb = 2\nc = 3\n") == ["c = 3"]


@pytest.mark.parametrize("name", ["quickstart.toml", "gpt2-124m.toml"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_small_number_of_ranks_fits(name, world_size):
    path = next(path for path in CONFIGS if path.name == name)
    assert resolve(load(path), world_size).parallel.pipeline == world_size


def test_gpt2_124m_has_the_published_shape():
    config = resolve(load(next(path for path in CONFIGS if path.name == "gpt2-124m.toml")), 12)
    model = config.model
    assert (model.layers, model.width, model.heads, model.context) == (12, 768, 12, 512)
    assert model.vocab == 50257
    for data in (2, 4, 8):
        resolve(load(CONFIGS[0].with_name("gpt2-124m.toml"), [f"parallel.data={data}", f"parallel.lanes={data}"]), data)
