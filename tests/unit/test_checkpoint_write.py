"""Writing and reading back: every shape, every cut, every coverage mistake."""

import json
import os
import random
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.checkpoints import make_checkpoint, make_header, make_pieces
from support.writing import begin, write_file

from hpcpipe.checkpoint.compare import compare
from hpcpipe.checkpoint.digests import digest_of
from hpcpipe.checkpoint.image import Image
from hpcpipe.checkpoint.layout import Piece, PieceSpec, candidates, locate
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.sparse import SparseFile
from hpcpipe.checkpoint.verify import unknown_files, verify
from hpcpipe.checkpoint.write import abandon, commit
from hpcpipe.errors import DamagedError, UsageError


@pytest.mark.parametrize("num_writers", [1, 2, 3, 5])
def test_what_is_read_is_what_was_written_for_any_cut(tmp_path, num_writers):
    path, tensors = make_checkpoint(tmp_path, 100, num_writers)
    assert path.name == "step-00000100"
    assert verify(path) == []
    with Reader(path, load_manifest(path)) as reader:
        for (name, kind), expected in tensors.items():
            out = np.full_like(expected, 77)
            reader.read(name, kind, out)
            assert out.tobytes() == expected.tobytes(), (name, kind)
            flat = np.zeros(expected.size, expected.dtype)
            reader.read(name, kind, flat)
            assert flat.tobytes() == expected.tobytes()


def test_any_range_is_read_across_the_pieces_of_several_files(tmp_path):
    path, tensors = make_checkpoint(tmp_path, 7, 3)
    name, kind = "layers/003/attention/qkv/weight", "moment1"
    whole = tensors[name, kind].reshape(-1)
    draw = np.random.default_rng(3)
    with Reader(path, load_manifest(path)) as reader:
        for _ in range(50):
            start, stop = sorted(draw.integers(0, whole.size + 1, 2).tolist())
            out = np.zeros(stop - start, whole.dtype)
            reader.read(name, kind, out, start, stop)
            assert np.array_equal(out, whole[start:stop])


def test_other_programs_read_the_files_as_hdf5(tmp_path):
    path, tensors = make_checkpoint(tmp_path, 100, 2)
    whole = {}
    for name in ("rank-0000.h5", "rank-0001.h5"):
        with h5py.File(path / name, "r") as file:
            assert (file.attrs["format"], file.attrs["version"], file.attrs["step"]) == ("hpcpipe-checkpoint", 2, 100)
            for (tensor, kind), expected in tensors.items():
                if f"{kind}/{tensor}" not in file:
                    continue
                dataset = file[f"{kind}/{tensor}"]
                target = whole.setdefault((tensor, kind), np.zeros_like(expected)).reshape(-1)
                if "start" in dataset.attrs:
                    assert dataset.ndim == 1
                    assert tuple(dataset.attrs["shape"]) == expected.shape
                    target[dataset.attrs["start"] : dataset.attrs["stop"]] = dataset[:]
                else:
                    assert dataset.shape == expected.shape
                    target[:] = dataset[()].reshape(-1)
    assert whole.keys() == tensors.keys()
    assert all(np.array_equal(whole[key], tensors[key]) for key in tensors)


def image_of(image, step, pieces):
    """Return the bytes of a step's file, and its record."""
    regions = image.regions(step, [piece.buffer for piece in pieces])
    data = b"".join(region.buffer for region in regions)
    return data, image.record("rank-0000.h5", step, regions, [digest_of(region.buffer) for region in regions])


def test_equal_state_gives_equal_files_now_and_later():
    pieces = make_pieces(2)[0]
    first, second = Image([piece.spec for piece in pieces]), Image([piece.spec for piece in pieces])
    made = image_of(first, 5, pieces)
    time.sleep(1.1)  # HDF5 counts times in seconds, should it keep any.
    assert image_of(Image([piece.spec for piece in pieces]), 5, pieces) == made
    for step in (2**40, 6, 1):
        assert image_of(second, step, pieces)[0] != made[0]
    assert image_of(second, 5, pieces) == made


def test_an_image_takes_the_bytes_where_they_lie_and_covers_the_file_once():
    pieces = make_pieces(3)[1]
    image = Image([piece.spec for piece in pieces])
    regions = image.regions(7, [piece.buffer for piece in pieces])
    end = 0
    for region in regions:
        assert region.offset == end
        assert region.buffer.nbytes > 0
        end += region.buffer.nbytes
        if region.piece is not None:
            assert np.shares_memory(np.frombuffer(region.buffer, np.uint8), pieces[region.piece].data)
    assert end == image.size_bytes
    held = {number for number, piece in enumerate(pieces) if piece.data.size}
    assert {region.piece for region in regions} == held | {None}


def test_an_image_of_a_large_model_holds_no_bytes_of_its_tensors():
    num_elements = 2**38
    specs = [PieceSpec("w", kind, (num_elements,), 0, num_elements, "float32") for kind in ("weight", "moment1")]
    image = Image(specs)
    assert image.size_bytes > 2 * 4 * num_elements
    assert image._file.held_bytes < 2**16
    with pytest.raises(ValueError, match=f"weight of w: needs {4 * num_elements} contiguous bytes, got 4"):
        image.regions(1, [memoryview(bytes(4))] * 2)


def test_a_sparse_file_is_a_file(tmp_path):
    draw = random.Random(3)
    sparse = SparseFile()
    with (tmp_path / "real").open("w+b", buffering=0) as real:
        for _ in range(2000):
            where, count = draw.choice((0, 4090, 8192, 2**33)) + draw.randrange(20), draw.randrange(9000)
            what = draw.randrange(5)
            for file in (sparse, real):
                file.seek(where)
            if what < 2:
                data = draw.randbytes(count)
                assert sparse.write(data) == real.write(data)
            elif what < 4:
                assert sparse.read(count) == real.read(count)
            else:
                assert sparse.truncate(where) == real.truncate(where)
            assert sparse.tell() == real.tell()
            assert sparse.seek(0, os.SEEK_END) == real.seek(0, os.SEEK_END) == sparse.size_bytes


def test_a_spec_comes_back_from_json():
    for piece in make_pieces(2)[1]:
        assert PieceSpec.from_json(json.loads(json.dumps(piece.spec.to_json()))) == piece.spec
    for change in ({"name": "../w"}, {"kind": "W"}, {"shape": [-2, -2]}, {"stop": 99}, {"dtype": "object"}):
        item = PieceSpec("w", "weight", (2, 2), 0, 4, "float32").to_json()
        with pytest.raises(ValueError, match="w"):
            PieceSpec.from_json({**item, **change})


def test_the_callers_arrays_are_not_changed(tmp_path):
    data = np.arange(15, dtype=np.float32).reshape(3, 5)
    data.flags.writeable = False
    write_file(begin(tmp_path, 1), 0, 1, [Piece("a", "weight", (3, 5), 0, 15, data)])
    assert data.shape == (3, 5)


def _piece(start, stop, *, size=10, kind="weight", dtype=np.float32):
    return Piece("w", kind, (size,), start, stop, np.arange(start, stop).astype(dtype))


@pytest.mark.parametrize(
    ("per_writer", "message"),
    [
        ([[_piece(0, 4)], [_piece(5, 10)]], r"no file holds the elements \[4, 5\)"),
        ([[_piece(1, 10)], []], r"no file holds the elements \[0, 1\)"),
        ([[_piece(0, 4)], [_piece(4, 9)]], "hold 9 elements of its 10"),
        ([[_piece(0, 5)], [_piece(4, 10)]], "from 4 on are held twice"),
        ([[_piece(0, 10)], [_piece(0, 10)]], "from 0 on are held twice"),
        ([[_piece(0, 0, size=0)], [_piece(0, 0, size=0)]], "held twice"),
        ([[_piece(0, 4)], [_piece(4, 11, size=11)]], "another file"),
        ([[_piece(0, 4)], [_piece(4, 10, dtype=np.float64)]], "float64"),
    ],
)
def test_elements_missing_or_held_twice_are_not_committed(tmp_path, per_writer, message):
    partial = begin(tmp_path, 100)
    records = [write_file(partial, writer, 100, pieces) for writer, pieces in enumerate(per_writer)]
    with pytest.raises(DamagedError, match=message):
        commit(partial, make_header(100), records)
    assert candidates(tmp_path) == []
    abandon(partial)
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_step_or_size_are_not_committed(tmp_path):
    partial = begin(tmp_path, 100)
    record = write_file(partial, 0, 99, [_piece(0, 10)])
    with pytest.raises(DamagedError, match="of step 99"):
        commit(partial, make_header(100), [record])
    with pytest.raises(DamagedError, match=r"step-00000100\.partial: the header is of step 99"):
        commit(partial, make_header(99), [record])
    record = write_file(partial, 1, 100, [_piece(0, 10)])
    os.truncate(partial / "rank-0001.h5", 100)
    with pytest.raises(DamagedError, match=r"rank-0001\.h5: has 100 bytes"):
        commit(partial, make_header(100), [record])
    (partial / "rank-0001.h5").unlink()
    with pytest.raises(DamagedError, match=r"rank-0001\.h5: is not there"):
        commit(partial, make_header(100), [record])
    assert candidates(tmp_path) == []


def test_a_piece_that_cannot_be_stored_is_refused_at_once():
    data = np.zeros((4, 6), np.float32)
    for wrong in (
        lambda: Piece("../w", "weight", (4, 6), 0, 24, data),
        lambda: Piece("a//b", "weight", (4, 6), 0, 24, data),
        lambda: Piece("w", "", (4, 6), 0, 24, data),
        lambda: Piece("w", "weight", (4, 6), 0, 23, data),
        lambda: Piece("w", "weight", (4, 5), 0, 24, data),
        lambda: Piece("w", "weight", (4, 3), 0, 12, data[:, ::2]),
        lambda: Piece("w", "weight", (4, 6), 0, 24, data.astype(">f4")),
        lambda: Piece("w", "weight", (4, 6), 0, 24, data.astype(complex)),
    ):
        with pytest.raises(ValueError, match=r"w|a//b"):
            wrong()
    with pytest.raises(ValueError, match="written twice"):
        Image([_piece(0, 4).spec, _piece(4, 10).spec])
    with pytest.raises(ValueError, match="one shape and dtype"):
        Image([_piece(0, 4).spec, _piece(4, 10, kind="moment1", dtype=np.float64).spec])


def test_a_reader_refuses_what_the_checkpoint_does_not_hold(tmp_path):
    path, _ = make_checkpoint(tmp_path, 100, 2)
    name = "layers/003/attention/qkv/weight"
    with Reader(path, load_manifest(path)) as reader:
        for tensor, kind in (("layers/004/w", "weight"), (name, "moment3")):
            with pytest.raises(DamagedError, match=f"no {kind} of {tensor}"):
                reader.read(tensor, kind, np.zeros(3, np.float32))
        for out in (np.zeros((7, 23), np.float64), np.zeros((23, 7), np.float32), np.zeros(160, np.float32)):
            with pytest.raises(DamagedError, match=r"float32 of shape \[7, 23\]"):
                reader.read(name, "weight", out)
        with pytest.raises(ValueError, match="contiguous"):
            reader.read(name, "weight", np.zeros((23, 7), np.float32).T)
        with pytest.raises(ValueError, match="not within its 161"):
            reader.read(name, "weight", np.zeros(4, np.float32), 160, 164)


def num_open():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_many_writers_do_not_exhaust_the_open_files(tmp_path):
    partial = begin(tmp_path, 1)
    pieces = [_piece(i, i + 1, size=40) for i in range(40)]
    path = commit(partial, make_header(1), [write_file(partial, i, 1, [piece]) for i, piece in enumerate(pieces)])
    before = num_open()
    out = np.zeros(40, np.float32)
    with Reader(path, load_manifest(path)) as reader:
        reader.read("w", "weight", out)
        assert num_open() <= before + 16
    assert num_open() == before
    assert np.array_equal(out, np.arange(40))


def test_the_header_comes_back_as_json_says_it(tmp_path):
    path, _ = make_checkpoint(tmp_path, 3, 1)
    header = load_manifest(path).header
    assert header == json.loads(json.dumps(make_header(3)))
    assert header["config"]["train"]["betas"] == [0.9, 0.95]


def test_candidates_are_newest_first_and_nothing_else(tmp_path):
    assert candidates(tmp_path / "nowhere") == []
    names = ["step-00000009", "step-00000100", "step-123456789", "step-99", "step-00000007.partial", "trash-x"]
    for name in [*names, "step-00000010x", "step-0000000100"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000500").write_text("a file")
    assert [path.name for path in candidates(tmp_path)] == ["step-123456789", "step-00000100", "step-00000009"]


def test_begin_clears_what_was_interrupted_and_nothing_else(tmp_path):
    good, _ = make_checkpoint(tmp_path, 4, 1)
    for name in ("step-00000005.partial", "trash-step-00000003-12ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-0000.h5").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("the user's")
    partial = begin(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", good.name, "step-00000005.partial"]
    assert list(partial.iterdir()) == []
    abandon(partial)
    abandon(partial)
    assert verify(good) == []


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    path, _ = make_checkpoint(tmp_path, 4, 1)
    (path / "rank-0000.h5").write_bytes(b"damaged")
    again, _ = make_checkpoint(tmp_path, 4, 2)
    assert again == path
    assert verify(again) == []
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_link_that_leads_nowhere_is_replaced(tmp_path):
    (tmp_path / "step-00000004").symlink_to("nowhere")
    path, _ = make_checkpoint(tmp_path, 4, 1)
    assert verify(path) == []
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_path_may_be_a_step_its_parent_or_the_run(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    make_checkpoint(root, 1, 1)
    newest, _ = make_checkpoint(root, 2, 1)
    assert locate(newest) == [newest]
    assert locate(root) == locate(tmp_path) == [newest, root / "step-00000001"]
    with pytest.raises(UsageError, match="no such directory"):
        locate(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DamagedError, match="holds no checkpoint"):
        locate(tmp_path / "empty")
    renamed = newest.rename(tmp_path / "best")
    assert locate(renamed) == [renamed]
    assert verify(renamed) == []
    monkeypatch.chdir(renamed)
    assert verify(locate(Path())[0]) == []


def test_unknown_files_are_a_note_not_a_problem(tmp_path):
    path, _ = make_checkpoint(tmp_path, 1, 1)
    (path / "README").write_text("mine")
    assert verify(path) == []
    assert unknown_files(path, load_manifest(path)) == ["README"]


def test_differences_are_sentences():
    found = {"model": {"width": 128, "heads": 4, "betas": [1, 2], "kind": "gpt2"}, "old": 1}
    expected = {"model": {"width": 256, "heads": 4, "betas": (1, 2), "tied": True, "kind": {"a": 1}}}
    assert compare(found, found) == []
    assert compare(found, expected) == [
        "model.width: checkpoint 128, config 256",
        "model.tied: checkpoint has none, config true",
        'model.kind: checkpoint "gpt2", config {"a": 1}',
        "old: checkpoint 1, config has none",
    ]
    assert compare({"a": 1}, {"a": True}) == ["a: checkpoint 1, config true"]
