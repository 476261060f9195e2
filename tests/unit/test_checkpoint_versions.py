"""Checkpoints of every earlier version are read, verified and loaded as on the day they were written."""

import json
import random

import numpy as np
import pytest
from support.checkpoints import make_checkpoint, make_header, make_pieces, make_tensors
from support.version1 import write_manifest, write_version1

from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.retain import retain
from hpcpipe.checkpoint.verify import verify, verify_file, verify_metadata
from hpcpipe.errors import DamagedError

QKV = "layers/003/attention/qkv/weight"
FILES = ("rank-0000.h5", "rank-0001.h5", "manifest.json")


@pytest.fixture
def path(tmp_path):
    return write_version1(tmp_path, make_header(100), make_pieces(2))


@pytest.mark.parametrize("num_writers", [1, 3])
def test_version_1_is_loaded(tmp_path, num_writers):
    path = write_version1(tmp_path, make_header(100), make_pieces(num_writers))
    manifest = load_manifest(path)
    assert (manifest.version, manifest.step, manifest.view) == (1, 100, None)
    assert verify(path) == []
    with Reader(path, manifest) as reader:
        for (name, kind), expected in make_tensors().items():
            out = np.full_like(expected, 77)
            reader.read(name, kind, out)
            assert out.tobytes() == expected.tobytes()
        part = np.zeros(50, np.float32)
        reader.read(QKV, "moment1", part, 60, 110)
        assert np.array_equal(part, make_tensors()[QKV, "moment1"].reshape(-1)[60:110])


def test_every_damage_of_version_1_is_noticed(path):
    draw = random.Random(2)
    manifest = load_manifest(path)
    for number in range(150):
        file = path / FILES[number % 3]
        sound = file.read_bytes()
        altered = bytearray(sound)
        position = draw.randrange(len(sound))
        altered[position] ^= 1 << draw.randrange(8)
        file.write_bytes(altered)
        (problem,) = verify(path)
        assert str(file) in problem
        if file.name in manifest.files:
            held = [region for region in manifest.regions[file.name] if region.start <= position < region.stop]
            assert (f"damaged: {held[0].label}" if held else "all its tensors are intact") in problem
            assert verify_metadata(path, manifest, file.name) == verify_file(path, manifest, file.name) == [problem]
        file.write_bytes(sound)
    assert verify(path) == []


def test_a_reader_notices_damage_in_a_part_of_a_piece_that_it_was_not_asked_for(path):
    manifest = load_manifest(path)
    piece = manifest.tensors[QKV].kinds["moment1"][1]
    data = bytearray((path / piece.file).read_bytes())
    data[piece.offset] ^= 1
    (path / piece.file).write_bytes(data)
    with Reader(path, manifest) as reader, pytest.raises(DamagedError, match=r"moment1 of layers.* was altered"):
        reader.read(QKV, "moment1", np.zeros(1, np.float32), 160, 161)


def test_a_manifest_of_version_1_cannot_have_the_digests_of_another(path):
    document = json.loads((path / "manifest.json").read_text())
    write_manifest(path, {**document, "version": 2})
    with pytest.raises(DamagedError, match="was altered"):
        load_manifest(path)
    document["files"][0]["blake3"] = document["files"][0].pop("blake2b")
    write_manifest(path, document)
    with pytest.raises(DamagedError, match="lacks 'blake2b'"):
        load_manifest(path)


def test_versions_live_side_by_side(tmp_path):
    old = write_version1(tmp_path, make_header(1), make_pieces(2))
    middle = write_version1(tmp_path, make_header(2), make_pieces(2))
    newest, _ = make_checkpoint(tmp_path, 3, 2)
    assert retain(tmp_path, newest, keep=2) == [old]
    assert verify(middle) == verify(newest) == []
