"""A hundred random faults, and that the campaign would see the mistakes that it is there for."""

import random

import files
import pytest
from files import KILLS, ORDER, Outcome, run_campaign, run_trial, table
from made import draw_model, load_newest
from support import fresh
from support.damage import KINDS

from hpcpipe.checkpoint import read
from hpcpipe.checkpoint.layout import candidates


def test_a_hundred_faults_are_noticed_and_a_good_state_is_left(tmp_path):
    said = []
    outcomes = run_campaign(100, fresh.SEED, tmp_path, said.append)
    assert said == []
    assert {outcome.kind for outcome in outcomes} == {*KINDS, *KILLS}
    assert sum(outcome.left_unfinished for outcome in outcomes) >= 10
    assert sum(outcome.took_older for outcome in outcomes) >= 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_another_file_than_before(tmp_path, kind):
    draw = random.Random(3)
    model = draw_model(draw, "3")
    for step in (1, 2):
        model.write(tmp_path, step)
    before = files._digests(tmp_path)
    damaged = next(filter(None, (KINDS[kind](candidates(tmp_path)[0], draw) for _ in range(50))))
    assert files._digests(tmp_path) != before
    assert damaged.parent == candidates(tmp_path)[0]


def first_trial(kind):
    return ORDER.index(kind)


def test_a_verifier_that_says_nothing_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "verify", lambda path: [])
    outcome = run_trial(1, first_trial("flipped bit in a tensor"), tmp_path)
    assert "verify says nothing" in outcome.silent[0]


def test_a_reader_that_checks_nothing_is_seen(tmp_path, monkeypatch):
    class AnyDigest:
        def hex(self):
            return self

        def __ne__(self, other):
            return False

    class Careless:
        def update(self, data):
            pass

        def digest(self):
            return AnyDigest()

    monkeypatch.setattr(read, "new_hash", lambda version: Careless())
    silent = [
        run_trial(1, first_trial("flipped bit in a tensor") + round * len(ORDER), tmp_path).silent for round in range(6)
    ]
    assert any("was loaded, not" in problem for problems in silent for problem in problems)


def test_tensors_that_are_not_those_written_are_seen(tmp_path, monkeypatch):
    def altered(root, draw):
        path, loaded, refused = load_newest(root, draw)
        next(iter(loaded.values())).reshape(-1)[0] += 1
        return path, loaded, refused

    monkeypatch.setattr(files, "load_newest", altered)
    outcome = run_trial(1, first_trial("flipped bit in the view"), tmp_path)
    assert any("not those that were written" in problem for problem in outcome.silent)


def test_a_state_that_is_lost_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "load_newest", lambda root, draw: None)
    outcome = run_trial(1, first_trial(KILLS[1]), tmp_path)
    assert "no checkpoint could be loaded" in outcome.unloadable
    assert "| 1 | 0 | 0 | 0 | 1 |" in table([Outcome(0, KILLS[1], unloadable=["x"])])
