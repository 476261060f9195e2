"""Which checkpoints stay, and that a good one always does."""

import os
import random

import numpy as np
import pytest
from support.checkpoints import make_checkpoint, make_header
from support.writing import begin, write_file

from hpcpipe.checkpoint import retain as retain_module
from hpcpipe.checkpoint.layout import Piece, candidates, step_of
from hpcpipe.checkpoint.retain import retain
from hpcpipe.checkpoint.verify import verify
from hpcpipe.checkpoint.write import commit


def make(root, step, val_loss=None):
    """Write a checkpoint of one small tensor."""
    partial = begin(root, step)
    record = write_file(partial, 0, step, [Piece("w", "weight", (3,), 0, 3, np.zeros(3, np.float32))])
    return commit(partial, {**make_header(step), "val_loss": val_loss}, [record])


def steps_in(root):
    return [step_of(path.name) for path in candidates(root)]


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [4, 3, 2, 1]), (1, [4]), (2, [4, 3]), (4, [4, 3, 2, 1]), (9, [4, 3, 2, 1])]
)
def test_the_newest_are_kept(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        newest, _ = make_checkpoint(tmp_path, step, 1)
    gone = retain(tmp_path, newest, keep=keep)
    assert [int(path.name[5:]) for path in candidates(tmp_path)] == left
    assert [int(path.name[5:]) for path in gone] == [step for step in (4, 3, 2, 1) if step not in left]
    assert len(list(tmp_path.iterdir())) == len(left)


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(tmp_path):
    for step in (1, 2, 3, 4, 5):
        newest, _ = make_checkpoint(tmp_path, step, 1)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    os.truncate(tmp_path / "step-00000004" / "rank-0000.h5", 10)
    retain(tmp_path, newest, keep=2)
    assert [path.name[-1] for path in candidates(tmp_path)] == ["5", "4", "3", "2"]
    assert verify(tmp_path / "step-00000002") == []


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_later_steps_neither_count_nor_go(tmp_path, keep):
    # A run that went on from step 2, because 6 and 8 are damaged in a way that sizes do not show, writes step 4.
    for step in (2, 6, 8):
        make_checkpoint(tmp_path, step, 1)
    newest, _ = make_checkpoint(tmp_path, 4, 1)
    retain(tmp_path, newest, keep=keep)
    left = [int(path.name[5:]) for path in candidates(tmp_path)]
    assert left == ([8, 6, 4] if keep == 1 else [8, 6, 4, 2])


def test_multiples_stay_for_ever(tmp_path):
    for step in range(10, 130, 10):
        newest = make(tmp_path, step)
        retain(tmp_path, newest, keep=2, keep_every=40)
    assert steps_in(tmp_path) == [120, 110, 80, 40]
    gone = retain(tmp_path, newest, keep=1)
    assert [step_of(path.name) for path in gone] == [110, 80, 40]


def test_the_best_stays_until_a_better_one_comes(tmp_path):
    losses = {10: None, 20: 3.0, 30: 2.0, 40: None, 50: 2.5, 60: 2.0, 70: 9.0, 80: 1.0, 90: 4.0, 100: 4.0}
    left = []
    for step, loss in losses.items():
        retain(tmp_path, make(tmp_path, step, loss), keep=1, keep_best=True)
        left.append(steps_in(tmp_path))
    assert left == [[10], [20], [30], [40, 30], [50, 30], [60], [70, 60], [80], [90, 80], [100, 80]]


def test_without_any_loss_none_is_the_best(tmp_path):
    for step in (1, 2, 3):
        newest = make(tmp_path, step)
    retain(tmp_path, newest, keep=1, keep_best=True)
    assert steps_in(tmp_path) == [3]


def test_a_damaged_best_is_no_best(tmp_path):
    for step, loss in ((1, 2.0), (2, 1.0), (3, 5.0), (4, 6.0)):
        newest = make(tmp_path, step, loss)
    os.truncate(tmp_path / "step-00000002" / "rank-0000.h5", 10)
    retain(tmp_path, newest, keep=1, keep_best=True)
    assert steps_in(tmp_path) == [4, 1]


def test_the_last_good_one_stays_even_if_it_is_not_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        newest = make(tmp_path, step)
    os.truncate(newest / "rank-0000.h5", 10)
    retain(tmp_path, newest, keep=1)
    assert steps_in(tmp_path) == [4, 3]


def test_a_manifest_that_stays_is_read_once(tmp_path, monkeypatch):
    read = []
    load = retain_module.load_manifest
    monkeypatch.setattr(retain_module, "load_manifest", lambda path: read.append(path.name) or load(path))
    for step in range(1, 9):
        retain(tmp_path, make(tmp_path, step, 1 / step), keep=1, keep_every=2, keep_best=True)
    assert len(read) == 8
    (tmp_path / "step-00000004" / "manifest.json").write_text("{}")
    retain(tmp_path, make(tmp_path, 9, 9.0), keep=1, keep_every=2, keep_best=True)
    assert read[8:] == ["step-00000009", "step-00000004"]


def test_a_link_to_a_checkpoint_goes_and_its_target_stays(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", 1)
    root = tmp_path / "checkpoints"
    for step in (2, 3):
        newest = make(root, step)
    (root / elsewhere.name).symlink_to(elsewhere)
    retain(root, newest, keep=1)
    assert steps_in(root) == [3]
    assert verify(elsewhere) == []


def test_whatever_the_settings_and_damages_the_newest_good_one_stays(tmp_path):
    draw = random.Random(4)
    for number in range(60):
        root = tmp_path / str(number)
        for step in range(1, 7):
            newest = make(root, step, draw.choice([None, draw.random()]))
        for path in draw.sample(candidates(root), draw.randrange(6)):
            file = path / draw.choice(["rank-0000.h5", "manifest.json"])
            draw.choice([file.unlink, lambda file=file: os.truncate(file, 20)])()
        good = [path for path in candidates(root) if verify(path) == []]
        keep = draw.randint(1, 3)
        retain(root, newest, keep=keep, keep_every=draw.randrange(4), keep_best=draw.random() < 0.5)
        assert set(good[:keep]) <= set(candidates(root))
