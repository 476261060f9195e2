"""Writing a configuration: it reads back equal, and says what each key means."""

import json
from dataclasses import replace
from pathlib import Path

from hpcpipe.config import document
from hpcpipe.config.check import resolve
from hpcpipe.config.dump import to_dict, to_toml
from hpcpipe.config.load import load
from hpcpipe.config.schema import Config, DataConfig, ParallelConfig, RunConfig, TrainConfig, documented_keys

ROOT = Path(__file__).parents[2]

AWKWARD = Config(
    run=RunConfig(dir='a "b"\\c\n\t\x7f é'),
    data=DataConfig(validation_fraction=0.1 + 0.2),
    parallel=ParallelConfig(pipeline=2, partition=(1, 3)),
    train=TrainConfig(learning_rate=1e-300, min_learning_rate=5e-324, betas=(0.0, 1 / 3)),
)


def test_toml_reads_back_equal(tmp_path):
    path = tmp_path / "config.toml"
    for config in (Config(), AWKWARD, resolve(replace(Config()), 4), resolve(AWKWARD, 2)):
        path.write_text(to_toml(config))
        assert load(path) == config


def test_every_key_has_its_documentation_above_it():
    text = to_toml(Config())
    for name, doc in documented_keys().items():
        assert f"# {doc}\n{name.split('.')[1]} = " in text


def test_dictionary_is_plain_json():
    plain = to_dict(AWKWARD)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["parallel"]["partition"] == [1, 3]


def test_the_reference_page_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == document.to_markdown(), "run `python -m hpcpipe.config.document > docs/configuration.md`"
