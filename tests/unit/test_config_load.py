"""Reading a configuration: what is taken, and what each refusal says."""

from pathlib import Path

import pytest

from hpcpipe.config.load import load, run_directory
from hpcpipe.config.schema import Config
from hpcpipe.errors import UsageError


@pytest.fixture
def write(tmp_path):
    def write_text(text: str) -> Path:
        path = tmp_path / "some.toml"
        path.write_text(text)
        return path

    return write_text


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_an_empty_file_is_the_defaults(write):
    assert load(write("")) == Config()


def test_values_of_every_type_are_taken(write):
    path = write(
        """
        [run]
        name = "a-b.c_1"
        [model]
        tied = false
        layers = 7
        [parallel]
        partition = [3, 4]
        timeout_s = 30
        [train]
        betas = [0, 0.5]
        """
    )
    config = load(path)
    assert config.run.name == "a-b.c_1"
    assert config.model.tied is False
    assert config.model.layers == 7
    assert config.parallel.partition == (3, 4)
    assert config.train.betas == (0.0, 0.5)
    assert isinstance(config.parallel.timeout_s, float)
    assert all(isinstance(beta, float) for beta in config.train.betas)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=5", "train", "steps", 5),
        (" train.steps = 5 ", "train", "steps", 5),
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("model.tied=false", "model", "tied", False),
        ("run.name=plain", "run", "name", "plain"),
        ('run.name="quoted"', "run", "name", "quoted"),
        ("run.name=2026-01-31", "run", "name", "2026-01-31"),
        ("run.name=42", "run", "name", "42"),
        ("run.dir=/scratch/a=b", "run", "dir", "/scratch/a=b"),
        ("parallel.partition=[1, 2]", "parallel", "partition", (1, 2)),
        ("parallel.partition=auto", "parallel", "partition", "auto"),
        ("data.file=", "data", "file", ""),
    ],
)
def test_override(write, override, section, key, value):
    config = load(write("[train]\nsteps = 3\n"), [override])
    assert getattr(getattr(config, section), key) == value


def test_the_last_override_wins_over_the_file_and_earlier_ones(write):
    path = write("[train]\nsteps = 'nonsense'\n")
    assert load(path, ["train.steps=1", "train.steps=2"]).train.steps == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nstpes = 5", ["train.stpes = 5", "train.steps"]),
        ("[train]\nlearning-rate = 0.1", ["train.learning-rate", "did you mean train.learning_rate"]),
        ("[train]\nmicrobatches = 4", ["train.microbatches", "another section: parallel.microbatches"]),
        ("[run]\nmicrobatchs = 4", ["run.microbatchs", "did you mean parallel.microbatches"]),
        ("[train]\nzzz = 4", ["train.zzz", "keys of [train] are steps, precision"]),
        ("[modle]\nlayers = 4", ["unknown section [modle]", "did you mean [model]"]),
        ("[zzz]\nlayers = 4", ["unknown section [zzz]", "run, model, data"]),
        ("steps = 4", ["steps = 4 stands outside every section", "train.steps"]),
        ("run = 4", ["run = 4", "[run]"]),
        ("[[run]]\nname = 'x'", ["run", "[run]"]),
        ("[train.steps]\nx = 1", ["train.steps = {x = 1}", "an integer"]),
    ],
)
def test_unknown_names_lead_to_the_nearest_known_one(write, text, words):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nsteps = true", ["train.steps = true", "an integer"]),
        ("[train]\nsteps = 5.0", ["train.steps = 5.0", "an integer"]),
        ("[train]\nsteps = -5", ["train.steps = -5", "an integer of at least 0"]),
        ("[train]\nsteps = 9223372036854775808", ["9223372036854775808", "at most 9223372036854775807"]),
        ("[train]\nclip = nan", ["train.clip = nan", "a finite number"]),
        ("[train]\nclip = inf", ["train.clip = inf", "a finite number"]),
        ("[train]\nclip = false", ["train.clip = false", "a number"]),
        ("[train]\nclip = '1'", ['train.clip = "1"', "a number"]),
        ("[train]\nbetas = [0.9]", ["train.betas = [0.9]", "a list of 2 numbers, and the list has 1"]),
        ("[train]\nbetas = 0.9", ["train.betas = 0.9", "a list of 2 numbers"]),
        ("[train]\nbetas = [0.9, true]", ["train.betas = [0.9, true]", "a number"]),
        ("[model]\ntied = 1", ["model.tied = 1", "true or false"]),
        ("[data]\nfile = 3", ["data.file = 3", "a string"]),
        ("[parallel]\npartition = 3", ["parallel.partition = 3", "a string or a list of integers"]),
        ("[parallel]\npartition = [1, 2.5]", ["[1, 2.5]", "a string or a list of integers"]),
        ("[parallel]\npartition = [1, -2]", ["[1, -2]", "at least 0"]),
        ("[checkpoint]\nevery = -1", ["checkpoint.every = -1: expected an integer of at least 0"]),
        ("[run]\nname = '../up'", ['run.name = "../up"', "letters"]),
        ("[run]\nname = '.hidden'", ["run.name", "the first a letter or digit"]),
        ("[run]\nname = ''", ['run.name = ""']),
        ("[run]\ndir = ''", ['run.dir = ""', '"."']),
        ('[run]\ndir = "a\\u0000b"', ["run.dir", "NUL"]),
    ],
)
def test_values_of_the_wrong_kind_are_named(write, text, words):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message


def test_all_problems_are_reported_at_once(write):
    message = refusal(write("[train]\nstpes = 5\nclip = 'x'\n"), "model.layer=2")
    assert len(message.splitlines()) == 3
    assert "--set model.layer=2: unknown key model.layer" in message
    assert "did you mean model.layers" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", ["--set train.steps", "section.key=value"]),
        ("steps=5", ["outside every section", "train.steps"]),
        ("train.steps.x=5", ["train.steps.x"]),
        ("train.steps=five", ['--set train.steps = "five"', "an integer"]),
        ("train.steps=5\n[model]", ["an integer"]),
        ("trian.steps=5", ["[train]"]),
        ("run.dir=\udcff", ["run.dir", "UTF-8"]),
    ],
)
def test_bad_overrides_are_named(write, override, words):
    message = refusal(write(""), override)
    for word in words:
        assert word in message


def test_a_missing_file_is_named(tmp_path):
    assert "absent.toml: no such configuration file" in refusal(tmp_path / "absent.toml")


def test_a_directory_is_refused(tmp_path):
    assert "cannot be read" in refusal(tmp_path)


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "some.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n")
    assert "not UTF-8 text" in refusal(path)


@pytest.mark.parametrize("text", ["[train]\nsteps = = 5\n", "[train]\nsteps = 1\nsteps = 2\n", "[train\n"])
def test_invalid_toml_is_reported_with_its_line(write, text):
    message = refusal(write(text))
    assert "not valid TOML" in message
    assert "at line " in message


def test_the_offending_line_is_shown(write):
    assert refusal(write("[train]\nsteps = = 5\n")).endswith("    steps = = 5")


def test_run_directory_survives_other_mistakes(write):
    path = write("[run]\nname = 'mine'\n[train]\nstpes = 'x'\n[modle]\n")
    assert run_directory(path, ["run.dir=/there", "zzz", "train.steps=x"]) == Path("/there/mine")


def test_run_directory_of_defaults(write):
    assert run_directory(write("")) == Path("runs/run")


@pytest.mark.parametrize("text", ["[run]\nname = 3", "[run]\nname = '..'", "[run]\ndir = ''", "not toml", "run = 1\n["])
def test_run_directory_is_none_when_it_cannot_be_known(write, text):
    assert run_directory(write(text)) is None


def test_run_directory_never_raises(tmp_path):
    assert run_directory(tmp_path / "absent") is None
    assert run_directory(tmp_path) is None
    assert run_directory(Path("a\0b")) is None
