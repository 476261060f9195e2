"""``hpcpipe checkpoint diff``: what differs, by how much, whoever wrote it."""

import argparse
import json
import math
import tracemalloc

import numpy as np
import pytest
from support.checkpoints import make_checkpoint, make_header, make_pieces
from support.version1 import write_version1
from support.writing import begin, write_file

from hpcpipe.checkpoint import difference
from hpcpipe.checkpoint.difference import compare_checkpoints
from hpcpipe.checkpoint.layout import Piece
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.write import commit
from hpcpipe.cli import checkpoint
from hpcpipe.errors import DamagedError

QKV = "layers/003/attention/qkv/weight"


@pytest.fixture
def call(capsys):
    parser = argparse.ArgumentParser()
    checkpoint.add_parser(parser.add_subparsers())

    def run(*words):
        args = parser.parse_args(["checkpoint", "diff", *map(str, words)])
        code = args.run(args)
        return code, capsys.readouterr().out

    return run


def write(root, tensors, step=1, **header):
    """Write whole tensors by (name, kind) from one rank."""
    pieces = [Piece(name, kind, data.shape, 0, data.size, data) for (name, kind), data in tensors.items()]
    partial = begin(root, step)
    return commit(partial, {**make_header(step), **header}, [write_file(partial, 0, step, pieces)])


def compare_values(root, a, b):
    a, b = np.asarray(a), np.asarray(b)
    (tensor,) = compare_checkpoints(
        write(root / "a", {("w", "weight"): a}), write(root / "b", {("w", "weight"): b})
    ).tensors
    return tensor.num_differing, tensor.largest_absolute, tensor.largest_relative


def test_grid_and_version_make_no_difference(call, tmp_path):
    paths = [make_checkpoint(tmp_path / str(number), 100, number)[0] for number in (1, 2, 5)]
    paths.append(write_version1(tmp_path / "old", make_header(100), make_pieces(3)))
    for path in paths[1:]:
        code, text = call(paths[0], path)
        assert code == 0
        assert "weight: all 7 tensors identical\n" in text
        assert text.endswith("\nidentical\n")


def test_a_run_directory_stands_for_its_newest(call, tmp_path):
    make_checkpoint(tmp_path / "checkpoints", 100, 1)
    newest, _ = make_checkpoint(tmp_path / "checkpoints", 200, 1)
    code, text = call(tmp_path, newest)
    assert code == 0
    code, text = call("--json", tmp_path, tmp_path / "checkpoints" / "step-00000100")
    report = json.loads(text)
    assert code == 1
    assert (report["identical"], report["differing"], report["num_compared"]) == (False, [], 21)
    assert report["header"] == [{"key": "step", "a": 200, "b": 100}, {"key": "tokens", "a": 819200, "b": 409600}]


def test_headers_that_only_say_who_wrote_it_do_not_make_a_difference(call, tmp_path):
    data = {("w", "weight"): np.ones(3, np.float32)}
    a = write(tmp_path / "a", data, grid={"pipeline": 8, "data": 1})
    b = write(tmp_path / "b", data, val_loss=1.5, fence="of another start")
    code, text = call(a, b)
    assert "fence" not in text
    assert code == 0
    assert "grid.pipeline: a 8, b 2\n" in text
    assert "val_loss: a has none, b 1.5\n" in text


def test_by_how_much_is_said(call, tmp_path):
    a = {
        ("u", "weight"): np.arange(1, 7, dtype=np.float32).reshape(2, 3),
        ("u", "moment1"): np.zeros((2, 3), np.float32),
    }
    b = {key: value.copy() for key, value in a.items()}
    b["u", "weight"][0, 1] = 2.5
    b["u", "weight"][1, 2] = 6.75
    a["gone", "weight"] = b["new", "moment1"] = np.ones(2, np.float32)
    a["s", "weight"], b["s", "weight"] = np.ones(4, np.float32), np.ones((2, 2), np.float32)
    paths = write(tmp_path / "a", a), write(tmp_path / "b", b)
    code, text = call(*paths, "--tensors")
    assert code == 1
    assert "only in a: weight of gone\n" in text
    assert "only in b: moment1 of new\n" in text
    assert "weight: 2 of 2 tensors differ, in 2 elements by at most 0.75 (absolute) and 0.2 (relative)\n" in text
    assert "    u: 2 of 6 elements by at most 0.75 and 0.2\n" in text
    assert "    s: a float32[4], b float32[2, 2]\n" in text
    assert "moment1: all 1 tensors identical\n" in text
    assert text.endswith("\ndifferent\n")
    report = json.loads(call(*paths, "--json")[1])
    (found,) = (item for item in report["differing"] if item["name"] == "u")
    assert found == {
        "name": "u",
        "kind": "weight",
        "type_a": "float32[2, 3]",
        "type_b": "float32[2, 3]",
        "num_elements": 6,
        "num_differing": 2,
        "largest_absolute": 0.75,
        "largest_relative": pytest.approx(0.2),
    }
    assert (report["only_a"], report["only_b"]) == (
        [{"name": "gone", "kind": "weight"}],
        [{"name": "new", "kind": "moment1"}],
    )


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.float32([0.0, 1.0]), np.float32([-0.0, 1.0]), (1, 0.0, 0.0)),
        (np.float32([math.nan, 1.0]), np.float32([math.nan, 1.0]), (0, 0.0, 0.0)),
        (np.float32([math.nan, 1.0]), np.float32([2.0, 1.0]), (1, math.inf, math.inf)),
        (np.float32([math.inf]), np.float32([-math.inf]), (1, math.inf, math.inf)),
        (np.float64([1e308]), np.float64([-1e308]), (1, math.inf, math.inf)),
        (np.float32([1e-45]), np.float32([0.0]), (1, float(np.float32(1e-45)), 1.0)),
        (np.float16([1.0, 2.0]), np.float16([1.0, 2.5]), (1, 0.5, 0.2)),
        (np.int8([-128, 3]), np.int8([127, 3]), (1, 255.0, 255 / 128)),
        (np.int64([-(2**63)]), np.int64([2**63 - 1]), (1, float(2**64 - 1), 2.0)),
        (np.uint64([2**64 - 1]), np.uint64([2**64 - 2]), (1, 1.0, 2.0**-64)),
        (np.uint8([]), np.uint8([]), (0, 0.0, 0.0)),
    ],
)
def test_differences_are_right_at_the_edges_of_every_type(tmp_path, a, b, expected):
    assert compare_values(tmp_path, a, b) == expected
    assert compare_values(tmp_path / "again", b, a) == expected


def test_blocks_add_up_and_memory_does_not(tmp_path, monkeypatch):
    draw = np.random.default_rng(5)
    a = draw.standard_normal(1_000_003, np.float32)
    b = a.copy()
    where = draw.choice(a.size, 1000, replace=False)
    b[where] += np.float32(0.5)
    b[a.size - 1] += np.float32(3.0)
    paths = [write(tmp_path / name, {("w", "weight"): data}) for name, data in (("a", a), ("b", b))]
    monkeypatch.setattr(difference, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr("hpcpipe.checkpoint.files.BLOCK_BYTES", 1 << 16)
    tracemalloc.start()
    (tensor,) = compare_checkpoints(*paths).tensors
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    differ = a != b
    expected = np.abs(a.astype(np.float64) - b)[differ]
    assert tensor.num_differing == np.count_nonzero(differ)
    assert tensor.largest_absolute == expected.max()
    assert tensor.largest_relative == (expected / np.maximum(abs(a), abs(b)).astype(np.float64)[differ]).max()
    assert peak < 1_500_000


@pytest.mark.parametrize("what", ["tensor", "around"])
def test_damage_is_no_difference(tmp_path, what):
    paths = [make_checkpoint(tmp_path / str(number), 100, number)[0] for number in (1, 2)]
    manifest = load_manifest(paths[1])
    regions = manifest.regions["rank-0001.h5"]
    (region, *_) = (region for region in regions if bool(region.label) == (what == "tensor"))
    data = bytearray((paths[1] / "rank-0001.h5").read_bytes())
    data[region.start] ^= 1
    (paths[1] / "rank-0001.h5").write_bytes(data)
    with pytest.raises(DamagedError, match=r"rank-0001\.h5"):
        compare_checkpoints(*paths)
