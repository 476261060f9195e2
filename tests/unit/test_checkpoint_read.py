"""A reader checks all that it touches, and reads no more than that takes."""

import os

import numpy as np
import pytest
from support.checkpoints import make_header
from support.writing import begin, write_file

from hpcpipe.checkpoint.files import BLOCK_BYTES
from hpcpipe.checkpoint.layout import Piece
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.verify import verify, verify_metadata
from hpcpipe.checkpoint.write import commit
from hpcpipe.errors import DamagedError

SIZE = BLOCK_BYTES  # in elements of 4 bytes: two pieces of two blocks each, less and more a little
CUT = SIZE // 2 - 77


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    data = np.random.default_rng(1).standard_normal(SIZE, np.float32)
    partial = begin(tmp_path_factory.mktemp("checkpoints"), 5)
    bounds = ((0, CUT), (CUT, SIZE))
    records = [
        write_file(partial, writer, 5, [Piece("w", "weight", (SIZE,), start, stop, data[start:stop])])
        for writer, (start, stop) in enumerate(bounds)
    ]
    return commit(partial, make_header(5), records), data


@pytest.fixture
def read_bytes(monkeypatch):
    """Count what is read from files."""
    counts = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: counts.append(preadv(*args)) or counts[-1])
    return counts


RANGES = [(0, SIZE), (0, CUT), (CUT, SIZE), (1, 2), (CUT - 1, CUT + 1), (CUT - 3_000_000, CUT + 3_000_000), (5, SIZE)]


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_any_part_of_large_pieces_is_read_and_each_piece_once(large, read_bytes, start, stop):
    path, data = large
    out = np.zeros(stop - start, np.float32)
    manifest = load_manifest(path)
    read_bytes.clear()
    with Reader(path, manifest) as reader:
        reader.read("w", "weight", out, start, stop)
    assert np.array_equal(out, data[start:stop])
    touched = 4 * (CUT * (start < CUT) + (SIZE - CUT) * (stop > CUT))
    assert sum(read_bytes) == touched
    assert len(read_bytes) <= touched / BLOCK_BYTES + 6


def test_the_next_part_of_a_piece_is_read_alone(large, read_bytes):
    path, data = large
    manifest = load_manifest(path)
    out = np.zeros(100, np.float32)
    with Reader(path, manifest) as reader:
        reader.read("w", "weight", out, 1000, 1100)
        read_bytes.clear()
        for start in (0, 2000, CUT - 100):
            reader.read("w", "weight", out, start, start + 100)
            assert np.array_equal(out, data[start : start + 100])
        assert read_bytes == [400, 400, 400]


def test_reader_and_metadata_together_read_every_byte_once(large, read_bytes):
    path, _ = large
    manifest = load_manifest(path)
    read_bytes.clear()
    assert [verify_metadata(path, manifest, name) for name in manifest.files] == [[], []]
    with Reader(path, manifest) as reader:
        reader.read("w", "weight", np.zeros(SIZE, np.float32))
    assert sum(read_bytes) == manifest.size_bytes
    read_bytes.clear()
    assert verify(path) == []
    assert sum(read_bytes) == manifest.size_bytes + sum(
        (path / name).stat().st_size for name in ("manifest.json", "view.h5")
    )


@pytest.mark.parametrize("position", [0, 12_345_678, 4 * CUT - 1])
@pytest.mark.parametrize("wanted", [(0, CUT), (0, 1), (CUT - 1, CUT), (3000, 3001)])
def test_a_flipped_bit_is_noticed_whichever_part_is_wanted(large, position, wanted):
    path, _ = large
    manifest = load_manifest(path)
    piece = manifest.tensors["w"].kinds["weight"][0]
    with (path / piece.file).open("r+b") as file:
        file.seek(piece.offset + position)
        byte = file.read(1)[0]
        file.seek(piece.offset + position)
        file.write(bytes([byte ^ 16]))
        file.flush()
        try:
            out = np.zeros(wanted[1] - wanted[0], np.float32)
            with Reader(path, manifest) as reader, pytest.raises(DamagedError, match="weight of w was altered"):
                reader.read("w", "weight", out, *wanted)
            assert verify_metadata(path, manifest, piece.file) == []
        finally:
            file.seek(piece.offset + position)
            file.write(bytes([byte]))
    assert verify(path) == []
