"""What other programs see in view.h5 is the model."""

import copy
import json
import random
import shutil
import time
from math import prod

import h5py
import numpy as np
import pytest
from support.checkpoints import make_checkpoint, make_header, make_pieces
from support.writing import begin, write_file

from hpcpipe.checkpoint import view
from hpcpipe.checkpoint.layout import Piece
from hpcpipe.checkpoint.manifest import assemble


def write(root, step, num_writers):
    partial = begin(root, step)
    records = [write_file(partial, writer, step, pieces) for writer, pieces in enumerate(make_pieces(num_writers))]
    return partial, assemble(make_header(step), records)


@pytest.mark.parametrize("num_writers", [1, 2, 3, 5, 40])
def test_the_view_is_the_model_wherever_it_is_opened(tmp_path, monkeypatch, num_writers):
    path, tensors = make_checkpoint(tmp_path / "checkpoints", 100, num_writers)
    moved = shutil.move(path, tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    with h5py.File(moved / "view.h5", "r") as file:
        assert (file.attrs["format"], file.attrs["step"]) == ("hpcpipe-checkpoint", 100)
        assert json.loads(file.attrs["model"]) == make_header(100)["model"]
        found = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        assert sorted(found) == sorted(f"{kind}/{name}" for name, kind in tensors)
        for (name, kind), expected in tensors.items():
            dataset = file[f"{kind}/{name}"]
            assert (dataset.shape, dataset.dtype) == (expected.shape, expected.dtype)
            assert np.array_equal(dataset[()], expected), (name, kind)


def test_what_a_missing_file_held_is_not_a_number(tmp_path):
    path, tensors = make_checkpoint(tmp_path, 100, 2)
    (path / "rank-0001.h5").unlink()
    name, kind = "layers/003/attention/qkv/weight", "moment1"
    with h5py.File(path / "view.h5", "r") as file:
        values = file[f"{kind}/{name}"][:].reshape(-1)
    expected = tensors[name, kind].reshape(-1)
    assert np.array_equal(values[:80], expected[:80])
    assert np.isnan(values[80:]).all()


def test_equal_documents_give_equal_views_and_only_the_step_is_made_anew(tmp_path, monkeypatch):
    _, document = write(tmp_path, 100, 3)
    _, other = write(tmp_path / "other", 100, 2)
    first = view.build(document)
    time.sleep(1.1)  # HDF5 counts times in seconds, should it keep any.
    view._build.cache_clear()
    assert view.build(copy.deepcopy(document)) == first
    _, later = write(tmp_path, 200, 3)
    view._build.cache_clear()
    fresh = view.build(later)
    assert view.build(document) == first
    with monkeypatch.context() as patch:
        patch.setattr(view, "_add", None)
        assert view.build(later) == fresh != first
    assert view.build(other) != first


def test_blocks_are_the_range_in_its_order():
    draw = random.Random(7)
    for _ in range(2000):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 4)))
        start, stop = sorted(draw.sample(range(prod(shape) + 1), 2))
        elements = np.arange(prod(shape)).reshape(shape)
        parts = list(view.blocks(shape, start, stop))
        assert len(parts) <= 2 * len(shape) - 1
        taken = [
            elements[tuple(slice(a, a + n) for a, n in zip(first, extents, strict=True))].reshape(-1)
            for first, extents in parts
        ]
        assert np.concatenate(taken).tolist() == list(range(start, stop))


def test_a_model_too_long_for_an_attribute_is_left_out(tmp_path):
    partial = begin(tmp_path, 1)
    data = np.zeros(3, np.float32)
    record = write_file(partial, 0, 1, [Piece("w", "weight", (3,), 0, 3, data)])
    document = assemble({"step": 1, "model": {"words": "x" * 70_000}}, [record])
    (partial / "view.h5").write_bytes(view.build(document))
    with h5py.File(partial / "view.h5", "r") as file:
        assert "model" not in file.attrs
        assert np.array_equal(file["weight/w"][:], data)
