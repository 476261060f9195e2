"""A checkpoint made to do harm is refused, and nothing outside the run directory is opened."""

import argparse
import json
import os
import pickle
import socket
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from support import fresh
from support.checkpoints import make_checkpoint
from support.watch import audited, opened_below

import hpcpipe.checkpoint.difference
import hpcpipe.cli.checkpoint_text  # noqa: F401 - what is imported later would be taken for something opened
from hpcpipe.checkpoint.digests import digest_of
from hpcpipe.checkpoint.layout import candidates, locate
from hpcpipe.checkpoint.manifest import load_manifest, render
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.retain import retain
from hpcpipe.checkpoint.verify import verify
from hpcpipe.cli import checkpoint
from hpcpipe.errors import DamagedError, HpcpipeError, UsageError

QKV = "layers/003/attention/qkv/weight"


@pytest.fixture
def run(tmp_path):
    """Make a run with a sound checkpoint of step 100 and one of step 200 that a test makes hostile."""
    root = tmp_path / "run" / "checkpoints"
    for step in (100, 200):
        make_checkpoint(root, step, 2)
    return tmp_path / "run"


@pytest.fixture
def outside(tmp_path):
    """Make what must not be touched: a checkpoint that would be sound, and a file."""
    folder = tmp_path / "outside"
    make_checkpoint(folder, 200, 2)
    (folder / "secret").write_text("secret")
    return folder


@pytest.fixture
def path(run):
    return run / "checkpoints" / "step-00000200"


def load(path):
    """Do what a restart does: every tensor of a checkpoint, or an error for people."""
    manifest = load_manifest(path)
    loaded = {}
    with Reader(path, manifest) as reader:
        for name, tensor in manifest.tensors.items():
            for kind in tensor.kinds:
                loaded[name, kind] = np.zeros(tensor.shape, tensor.dtype)
                reader.read(name, kind, loaded[name, kind])
    return loaded


def use(run, outside, capsys):
    """Do all that hpcpipe ever does with checkpoints; return verify's words and whether step 200 could be loaded."""
    root = run / "checkpoints"
    parser = argparse.ArgumentParser()
    checkpoint.add_parser(parser.add_subparsers())
    started = time.monotonic()
    with opened_below(outside) as below, audited() as heard:
        paths = locate(run)
        assert paths == candidates(root)
        problems = {path.name: verify(path) for path in paths}
        loaded = set()
        for path in paths:
            try:
                load(path)
                loaded.add(path.name)
            except HpcpipeError:
                pass
        for words in (["show", "--tensors", run], ["verify", run], ["diff", run, root / "step-00000100"]):
            args = parser.parse_args(["checkpoint", *map(str, words)])
            try:
                args.run(args)
            except HpcpipeError as error:
                print(error)
        make_checkpoint(root, 300, 1)
        retain(root, root / "step-00000300", keep=2, keep_best=True)
    assert below == []
    strangers = [
        (event, what)
        for event, what in heard
        if event != "open"
        or (Path(os.fsdecode(what)).is_absolute() and not str(what).startswith((str(run), "/proc/self/", "/sys/")))
    ]
    assert strangers == []
    assert time.monotonic() - started < 20
    shown = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert "step-00000100" in loaded
    assert problems["step-00000100"] == []
    return problems.get("step-00000200"), "step-00000200" in loaded


def rewrite(path, change):
    """Alter a manifest as somebody would who also makes its digest right."""
    document = json.loads((path / "manifest.json").read_text())
    document.pop("blake3")
    change(document)
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    (path / "manifest.json").write_bytes(render({**document, "blake3": digest_of(text).hex()}))


def test_a_sound_run_is_no_hostile_one(run, outside, capsys):
    assert use(run, outside, capsys) == ([], True)


def test_what_is_opened_outside_is_seen(outside):
    with opened_below(outside) as below, audited() as heard:
        (outside / "secret").read_text()
        with h5py.File(outside / "step-00000200" / "rank-0000.h5"):
            pass
    assert str(outside / "secret") in below
    assert str(outside / "step-00000200" / "rank-0000.h5") in below
    assert ("open", str(outside / "secret")) in [(event, str(what)) for event, what in heard]


@pytest.mark.parametrize("name", ["rank-0001.h5", "manifest.json", "view.h5", ""])
def test_links_are_not_followed(run, outside, path, capsys, name):
    if name:
        (path / name).unlink()
    else:
        path.rename(run / "aside")
    (path / name if name else path).symlink_to(outside / "step-00000200" / name)
    problems, is_loaded = use(run, outside, capsys)
    assert "symbolic link, which is not followed" in problems[0]
    # Nothing is loaded from the view, so that a run can go on without it.
    assert is_loaded == (name == "view.h5")


def test_a_link_that_somebody_names_is_followed(tmp_path, outside):
    link = tmp_path / "latest"
    link.symlink_to(outside / "step-00000200")
    assert verify(locate(link)[0]) == []


def make_special(path, kind):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(path.parent)
            server.bind(path.name)
            os.chdir(here)
    elif kind == "directory":
        path.mkdir()
    else:
        try:
            os.mknod(path, 0o020644, os.makedev(1, {"zero": 5, "full": 7}[kind]))
            os.close(os.open(path, os.O_RDONLY))
        except OSError:
            pytest.skip("this account may not make device files")


@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "zero", "full"])
@pytest.mark.parametrize("name", ["rank-0001.h5", "manifest.json", "view.h5"])
def test_what_is_no_file_is_refused_and_nothing_waits(run, outside, path, capsys, name, kind):
    (path / name).unlink()
    make_special(path / name, kind)
    problems, is_loaded = use(run, outside, capsys)
    assert str(path / name) in problems[0]
    assert is_loaded == (name == "view.h5")


def make_hostile_hdf5(file, outside):
    """Write an HDF5 file that leads elsewhere by every means that HDF5 has."""
    victim = str(outside / "step-00000200" / "rank-0000.h5")
    with h5py.File(file, "w", libver="latest") as hostile:
        hostile["weight/external"] = h5py.ExternalLink(victim, f"/weight/{QKV}")
        hostile["weight/soft"] = h5py.SoftLink("/weight/external")
        hostile["weight/round"] = h5py.SoftLink("/weight/round")
        hostile.create_dataset("weight/raw", (6,), "u1", external=[(str(outside / "secret"), 0, 6)])
        layout = h5py.VirtualLayout((7, 23), "f4")
        layout[:] = h5py.VirtualSource(victim, f"weight/{QKV}", (7, 23))
        hostile.create_virtual_dataset("weight/virtual", layout)
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((4,))
        creation.set_filter(32000, h5py.h5z.FLAG_OPTIONAL, (1,))
        h5py.h5d.create(hostile.id, b"filtered", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((4,)), creation)
        hostile.create_dataset("absurd", (2**40, 2**20), "f8", chunks=(1, 1))
        payload = pickle.dumps(Canary(outside))
        hostile.attrs["config"] = np.void(payload)
        hostile.attrs.create("pickled", payload.hex())


class Canary:
    """Leaves a trace when it is unpickled."""

    def __init__(self, outside):
        self.outside = outside

    def __reduce__(self):
        return Path.touch, (self.outside / "unpickled",)


@pytest.mark.parametrize("name", ["rank-0000.h5", "view.h5"])
def test_hdf5_that_leads_elsewhere_is_refused(run, outside, path, capsys, monkeypatch, name):
    plugins = outside / "plugins"
    plugins.mkdir()
    monkeypatch.setenv("HDF5_PLUGIN_PATH", str(plugins))
    make_hostile_hdf5(path / name, outside)
    problems, is_loaded = use(run, outside, capsys)
    assert str(path / name) in problems[0]
    assert is_loaded == (name == "view.h5")
    assert not (outside / "unpickled").exists()


def test_hdf5_that_leads_elsewhere_is_bytes_even_to_a_manifest_that_vouches_for_it(run, outside, path, capsys):
    make_hostile_hdf5(path / "rank-0000.h5", outside)
    data = (path / "rank-0000.h5").read_bytes()
    digests = [digest_of(data[:100]), digest_of(data[100:104]), digest_of(data[104:])]

    def vouch(document):
        document["header"]["config"] = {"pickled": pickle.dumps(Canary(outside)).hex()}
        document["files"] = [
            {
                "name": "rank-0000.h5",
                "bytes": len(data),
                "blake3": digest_of(b"".join(digests)).hex(),
                "metadata": [
                    {"offset": 0, "bytes": 100, "blake3": digests[0].hex()},
                    {"offset": 104, "bytes": len(data) - 104, "blake3": digests[2].hex()},
                ],
            }
        ]
        piece = {"file": "rank-0000.h5", "start": 0, "stop": 1, "offset": 100, "blake3": digests[1].hex()}
        document["tensors"] = {"external": {"shape": [1], "dtype": "float32", "kinds": {"weight": [piece]}}}

    rewrite(path, vouch)
    assert use(run, outside, capsys) == ([], True)
    assert load(path)["external", "weight"].tobytes() == data[100:104]
    assert not (outside / "unpickled").exists()


def first_piece(document):
    return document["tensors"][QKV]["kinds"]["weight"][0]


def nest(levels):
    value = {}
    for _ in range(levels):
        value = {"deeper": value}
    return value


NAMES = ["../../outside/secret", "/etc/passwd", "rank-0000.h5/../x", "rank-0000.h5\0", "rank-0000.h5\n", "RANK-0000.h5"]
NAMES += ["..", "", "manifest.json", "view.h5", "rank-٠٠٠٠.h5", "rank-0000.h5\x1b[2J"]
CHANGES = {
    **{f"file {name!r}": lambda d, name=name: d["files"][0].update(name=name) for name in NAMES},
    **{f"piece {name!r}": lambda d, name=name: first_piece(d).update(file=name) for name in NAMES},
    **{f"view {name!r}": lambda d, name=name: d["view"].update(name=name) for name in NAMES if name != "view.h5"},
    **{
        f"tensor {name!r}": lambda d, name=name: d["tensors"].update({name: d["tensors"].pop(QKV)})
        for name in ("../x", "/x", "", "a//b", "a/../../b", "x\0", "\x1b]0;title\x07", "a" * 100_000 + "/..")
    },
    "kind": lambda d: d["tensors"][QKV]["kinds"].update({"../w": d["tensors"][QKV]["kinds"].pop("weight")}),
    "dimensions": lambda d: d["tensors"][QKV].update(shape=[1] * 100_000),
    "extent": lambda d: d["tensors"][QKV].update(shape=[2**63]),
    "product": lambda d: d["tensors"][QKV].update(shape=[2**62] * 32),
    "negative": lambda d: d["tensors"][QKV].update(shape=[-7, -23]),
    "fraction": lambda d: d["tensors"][QKV].update(shape=[7.0, 23.0]),
    "object": lambda d: d["tensors"][QKV].update(dtype="object"),
    "void": lambda d: d["tensors"][QKV].update(dtype=["float32"]),
    "offset": lambda d: first_piece(d).update(offset=2**62),
    "stop": lambda d: first_piece(d).update(stop=2**62),
    "bytes": lambda d: d["files"][0].update(bytes=2**62),
    "view bytes": lambda d: d["view"].update(bytes=2**62),
    "many pieces": lambda d: d["tensors"][QKV]["kinds"].update(weight=[first_piece(d)] * 10_000),
    "many files": lambda d: d["files"].extend([{**d["files"][0], "metadata": []}] * 10_000),
    "no files": lambda d: d.update(files={}),
    "text": lambda d: d.update(files="rank-0000.h5"),
    "digest": lambda d: first_piece(d).update(blake3=["0" * 64]),
    "step": lambda d: d.update(step=2**70),
    "version": lambda d: d.update(version=10**30),
    "nesting": lambda d: d["header"].update(config=nest(40)),
    "header": lambda d: d.update(header=[]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=[ascii(name)[:60] for name in CHANGES])
def test_a_manifest_that_lies_is_refused(run, outside, path, capsys, change):
    rewrite(path, change)
    problems, is_loaded = use(run, outside, capsys)
    assert len(problems) >= 1
    assert len(problems[0]) < 1000
    # Of the view nothing is loaded; but its name may not be another.
    assert not is_loaded or problems[0].startswith(str(path / "view.h5"))


def test_texts_cannot_command_the_terminal(run, outside, path, capsys):
    rewrite(path, lambda document: document["header"]["model"].update({"kind": "\x1b]0;x\x07\u202e", "\x1b[2J": 1}))
    (path / "\x1b[2J").write_text("unknown")
    assert use(run, outside, capsys) == ([], True)


@pytest.mark.parametrize(
    "text", [b"[" * 1_000_000, b'{"a":' * 1_000_000, b'{"format":"hpcpipe-checkpoint","version":' * 9]
)
def test_deep_nesting_is_refused(run, outside, path, capsys, text):
    (path / "manifest.json").write_bytes(text)
    problems, is_loaded = use(run, outside, capsys)
    assert "manifest.json" in problems[0]
    assert not is_loaded


def test_a_manifest_too_large_to_be_one_is_refused_unread(path, monkeypatch):
    os.truncate(path / "manifest.json", 1 << 30)
    monkeypatch.setattr(os, "preadv", None)
    with pytest.raises(DamagedError, match="has 1,073,741,824 bytes, a manifest at most 268,435,456"):
        load_manifest(path)


def test_a_header_may_be_as_deep_as_a_configuration(path):
    rewrite(path, lambda document: document["header"].update(config=nest(20)))
    assert verify(path) == []


def nodes(value, path=()):
    """List the places of a document."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes(child, (*path, key))


VALUES = [None, True, -1, 0, 1, 2**63, 1.5, "", "x", "\x1b[2J", [], [[]], [["a", 1]], {}, {"a": []}, "0" * 64, 2**62]


def test_whatever_stands_anywhere_in_a_manifest_is_refused_or_harmless(path, capsys):
    text = (path / "manifest.json").read_bytes()
    places = [place for place in nodes(json.loads(text)) if place and place[0] != "blake3"]
    parser = argparse.ArgumentParser()
    checkpoint.add_parser(parser.add_subparsers())
    refused = 0
    for _ in range(250):
        (path / "manifest.json").write_bytes(text)
        place = places[fresh.RANDOM.integers(len(places))]
        value = VALUES[fresh.RANDOM.integers(len(VALUES))]

        def put(document, place=place, value=value):
            for key in place[:-1]:
                document = document[key]
            document[place[-1]] = value

        rewrite(path, put)
        try:
            load(path)
        except DamagedError:
            refused += 1
        verify(path)
        retain(path.parent, path, keep=9, keep_best=True)
        for words in (["show", "--tensors", path], ["diff", path, path.parent / "step-00000100"]):
            args = parser.parse_args(["checkpoint", *map(str, words)])
            try:
                args.run(args)
            except DamagedError as error:
                assert len(str(error)) < 1000, (place, value)
    assert refused > 180
    shown = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


GPT2 = {"kind": "gpt2", "layers": 1, "width": 4, "heads": 2, "context": 4, "vocab": 257, "tied": True}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({}, "sizes"),
        ({"model": None}, "TypeError"),
        ({"model": {**GPT2, "width": 2**40}}, "has more than its 257 parameters"),
        ({"model": {**GPT2, "layers": 2**60}}, "has more than its"),
        ({"model": {**GPT2, "width": "4"}}, "TypeError"),
        ({"model": {**GPT2, "layers": -1}}, "sizes"),
        ({"model": {**GPT2, "vocab": 1, "width": 1}}, "tokenizer"),
        ({"model": {**GPT2, "vocab": 1, "width": 1}, "data": {"tokenizer": "../x"}}, "x"),
        ({"model": {**GPT2, "unknown": 1}}, "unknown"),
    ],
)
def test_a_header_of_no_model_is_not_sampled(path, header, words):
    from hpcpipe.train.sample import sample

    rewrite(path, lambda document: document["header"].update(header))
    with pytest.raises(HpcpipeError, match=words):
        sample(path, "a", 1, 0.0, 1)


def test_a_checkpoint_of_no_model_is_of_another_model(path):
    from hpcpipe.config.schema import Config
    from hpcpipe.train.load import check_model

    rewrite(path, lambda document: document["header"].pop("model"))
    with pytest.raises(UsageError, match=r"holds another model: model: checkpoint null, config \{"):
        check_model(Config(), path, load_manifest(path))
