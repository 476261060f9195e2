"""Costs, predictions, and the choice of partition and schedule that is made from them."""

import json
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hpcpipe.config.check import check_stages, resolve
from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig
from hpcpipe.errors import UsageError
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.schedule.build import build
from hpcpipe.train import choose as choose_module
from hpcpipe.train import costs as costs_module
from hpcpipe.train import plan as plan_module
from hpcpipe.train import profile as profile_module
from hpcpipe.train.choose import choose_schedule, plan_greedy, plan_schedule
from hpcpipe.train.costs import MeasuredCosts
from hpcpipe.train.predict import costs_of, layers_of_stages, predict_step
from hpcpipe.train.profile import LayerCosts, profile_layers

BLOCK = LayerCosts(1.0, 1.0, 1.0, 2.0, 0.1)
TICKS = {"forward": 10, "backward_input": 100, "backward_weight": 1000, "recompute": 4}


def measured(embedding=0.0, head=0.0, message_s=0.0):
    def times(factor):
        return LayerCosts(*(factor * value for value in (1.0, 1.0, 1.0, 2.0, 0.0)))

    return MeasuredCosts(times(embedding), BLOCK, times(head), message_s, "now", False)


def config(num_ranks=4, layers=8, **parallel):
    parallel = {"microbatches": 8, "schedule": "auto", **parallel}
    model = ModelConfig(layers=layers, width=12, heads=3, context=6, vocab=11)
    return resolve(Config(model=model, parallel=ParallelConfig(**parallel)), num_ranks)


def test_a_prediction_is_the_simulated_pipeline_and_the_slowest_update():
    schedule = build("1f1b", 4, 8)
    even = config(partition=(2, 2, 2, 2))
    prediction = predict_step(even, schedule, measured(), cores=None)
    assert prediction.pipeline_s == pytest.approx(2 * 33)
    assert prediction.update_s == pytest.approx(0.2)
    assert prediction.step_s == pytest.approx(2 * 33 + 0.2)
    replicas = config(8, partition=(2, 2, 2, 2), data=2)
    assert predict_step(replicas, schedule, measured(), cores=None).update_s == pytest.approx(0.1)
    late = replace(measured(), overhead=1.5)
    assert predict_step(even, schedule, late, cores=None).step_s == pytest.approx(1.5 * (2 * 33 + 0.2))
    one_core = predict_step(even, schedule, measured(), cores=1)
    assert one_core.step_s == pytest.approx(8 * 8 * 3 + 0.8)


def test_replicas_take_time_to_agree():
    alone, two, four = (config(2, data=1), config(4, data=2), config(8, data=4))
    plans = [
        plan_schedule(check_stages(c, 2), build("1f1b", 2, 8 // d), measured(message_s=1.0), None)
        for c, d in ((alone, 1), (two, 2), (four, 4))
    ]
    times = [plan.prediction.exchange_s for plan in plans]
    assert times[0] == 0 and times[1] > 0 and times[2] == pytest.approx(1.5 * times[1])


def test_embedding_and_head_count_where_they_are():
    stages = costs_of(layers_of_stages([1, 2, 0], measured(embedding=0.5, head=3.0)), message_s=0.1)
    assert stages.forward == [1.5, 2.0, 3.0]
    assert stages.backward == [3.0, 4.0, 6.0]
    assert stages.message == 0.1


def test_a_partition_by_hand_stays_and_an_automatic_one_is_cut_by_costs():
    schedule = build("1f1b", 4, 8)
    by_hand = check_stages(config(partition=(5, 1, 1, 1)), 4)
    assert plan_schedule(by_hand, schedule, measured(), None).config.parallel.partition == (5, 1, 1, 1)
    auto = check_stages(config(layers=9), 4)
    plan = plan_schedule(auto, schedule, measured(head=3.0), None)
    assert plan.config.parallel.partition == (3, 3, 3, 0)
    assert plan.prediction.timeline.bubble == pytest.approx(9 * 3)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_the_cut_wins_back_what_a_heavy_last_stage_loses(name, num_ranks):
    """A last stage of 25 percent more: the measured cut recovers at least 90 percent of the lost efficiency."""
    # As many blocks as make an even cut possible again: p blocks' worth of head over p stages.
    per_stage = 4 * num_ranks
    blocks = per_stage * num_ranks
    schedule = build(name, num_ranks, 4 * num_ranks)

    def efficiency(costs, partition):
        setting = check_stages(config(num_ranks, blocks, partition=partition, microbatches=4 * num_ranks), num_ranks)
        timeline = plan_schedule(setting, schedule, costs, None).prediction.timeline
        return 1 - timeline.bubble / timeline.makespan

    even = (per_stage,) * num_ranks
    heavy = measured(head=per_stage / 4)
    best, lost, auto = efficiency(measured(), even), efficiency(heavy, even), efficiency(heavy, "auto")
    assert lost < best - 0.03
    assert (auto - lost) / (best - lost) >= 0.9


def test_the_fastest_by_simulation_is_chosen():
    choice = choose_schedule(config(), measured(), None)
    times = [candidate.prediction.step_s for candidate in choice.ranking]
    assert times == sorted(times) and choice.chosen.prediction.step_s <= 1.002 * times[0]
    assert {candidate.config.parallel.schedule for candidate in choice.ranking} >= {"1f1b", "zb-h1", "interleaved"}
    plain = next(c for c in choice.ranking if c.config.parallel.schedule == "1f1b")
    assert choice.chosen.prediction.step_s < 0.85 * plain.prediction.step_s
    assert choice.chosen.schedule.num_stages == len(choice.chosen.config.parallel.partition)


def test_1f1b_stays_where_nothing_is_worth_the_change():
    choice = choose_schedule(config(1, layers=3), measured(), None)
    assert choice.chosen.config.parallel.schedule == "1f1b"
    # One core: every order of the same work takes the same time.
    assert choose_schedule(config(), measured(), cores=1).chosen.config.parallel.schedule == "1f1b"


def test_messages_speak_against_many_chunks():
    fast = choose_schedule(config(2, layers=16), measured(), None).chosen
    slow = choose_schedule(config(2, layers=16), measured(message_s=5.0), None).chosen
    assert slow.config.parallel.chunks < fast.config.parallel.chunks or slow.schedule.name != fast.schedule.name
    alternatives = choose_schedule(config(2, layers=16), measured(message_s=5.0), None).ranking
    assert slow.prediction.step_s <= 1.01 * alternatives[0].prediction.step_s


def test_what_does_not_fit_into_memory_is_refused_with_its_bytes():
    free = choose_schedule(config(), measured(), None)
    limit = sorted(candidate.memory_bytes for candidate in free.ranking)[2]
    tight = choose_schedule(config(), measured(), None, limit)
    assert all(candidate.memory_bytes <= limit for candidate in tight.ranking)
    assert any("GiB per rank" in reason for reason in tight.refused.values())
    with pytest.raises(UsageError, match=r'schedule = "auto": no schedule can run .*1f1b: needs'):
        choose_schedule(config(), measured(), None, 10)


def test_chunks_and_partition_that_are_given_stay():
    chosen = choose_schedule(config(chunks=2), measured(), None)
    assert {candidate.config.parallel.chunks for candidate in chosen.ranking} == {2}
    chosen = choose_schedule(config(partition=(3, 2, 2, 1)), measured(), None)
    assert {candidate.config.parallel.partition for candidate in chosen.ranking} == {(3, 2, 2, 1)}


def test_chunks_that_are_asked_for_are_tried():
    chosen = choose_schedule(config(2, layers=12, chunks=5), measured(), None)
    assert {candidate.config.parallel.chunks for candidate in chosen.ranking} == {5}
    assert choose_schedule(config(1, layers=4, chunks=2), measured(), None).chosen.config.parallel.chunks == 2


def test_greedy_is_made_once_for_the_costs_of_the_cut(monkeypatch):
    built = []

    def counting(name, *arguments):
        built.append(name)
        return build(name, *arguments)

    monkeypatch.setattr(choose_module, "build", counting)
    choice = choose_schedule(config(chunks=1), measured(head=2.0), None)
    labels = [candidate.label for candidate in choice.ranking]
    assert labels.count("greedy") == labels.count("greedy, stash 8") == 1
    assert built.count("greedy") == 2


@pytest.mark.parametrize("stash", [0, 8])
def test_a_step_is_explained_by_the_schedule_that_ran(monkeypatch, stash):
    """Other costs than the plan's would make another greedy schedule, which nobody ran."""
    planned, observed = measured(), replace(measured(), block=LayerCosts(1.0, 0.3, 3.0, 3.3, 0.1))
    option = check_stages(config(schedule="greedy", chunks=2), 8)
    candidate = plan_greedy(option, planned, None, stash)
    ran, again = (plan.schedule for plan in (candidate, plan_greedy(option, observed, None)))
    explained = predict_step(candidate.config, ran, observed, None)
    assert explained.step_s > 1.05 * predict_step(candidate.config, again, observed, None).step_s

    added, kept = [], []
    monkeypatch.setattr(plan_module, "observed_costs", lambda *_: observed)
    monkeypatch.setattr(plan_module, "keep_costs", lambda _, costs: kept.append(costs))
    session = SimpleNamespace(
        config=candidate.config,
        schedule=ran,
        grid=None,
        waiter=None,
        num_local_ranks=4,
        events=SimpleNamespace(add=lambda event, **facts: added.append((event, facts))),
        console=SimpleNamespace(say=lambda _: None),
    )
    plan = plan_module.Plan(candidate, None, planned, None)
    for steps_s, overhead in ((1.1, 1.1), (9.0, 1.25), (0.9, 1.0)):
        plan_module.compare_with_prediction(session, plan, [steps_s * explained.step_s] * 10, {})
        event, facts = added.pop()
        assert event == "step time"
        assert facts["explained_s"] == explained.step_s and facts["predicted_s"] == candidate.prediction.step_s
        assert kept.pop() == replace(observed, overhead=pytest.approx(overhead))
    plan_module.compare_with_prediction(session, plan, [1.0] * 9, {})
    assert not added and not kept


class Clocked:
    """A layer whose functions move a clock by known ticks."""

    def __init__(self, layer, factor, move):
        self._layer = layer
        for name, ticks in TICKS.items():
            setattr(self, name, self._moving(getattr(layer, name), factor * ticks, move))

    def __getattr__(self, name):
        return getattr(self._layer, name)

    @staticmethod
    def _moving(function, ticks, move):
        def run(*arguments):
            function(*arguments)
            move(ticks)

        return run


@pytest.fixture
def clock(monkeypatch):
    """Replace processor time by ticks: one for each reading, and those of the layers between two readings."""
    now = 0

    def move(ticks):
        nonlocal now
        now += ticks

    def read():
        move(1)
        return now

    def build_clocked(*arguments):
        embedding, *blocks, head = build_layers(*arguments)
        pairs = [(embedding, 1), *((block, 2) for block in blocks), (head, 3)]
        return tuple(Clocked(layer, factor, move) for layer, factor in pairs)

    monkeypatch.setattr(time, "thread_time", read)
    monkeypatch.setattr(profile_module, "build_layers", build_clocked)


@pytest.mark.usefixtures("clock")
def test_layers_are_timed():
    for factor, costs in enumerate(profile_layers(config(1)), start=1):
        forward, backward_input, backward_weight, _ = (factor * ticks + 1 for ticks in TICKS.values())
        whole = backward_input + backward_weight
        assert costs == LayerCosts(forward, backward_input, backward_weight, whole, update=1)


@pytest.mark.usefixtures("clock")
def test_recomputing_costs_a_forward_more():
    setting = config(1)
    plain = profile_layers(setting)
    again = profile_layers(replace(setting, train=replace(setting.train, recompute="full")))
    for before, after in zip(plain, again, strict=True):
        assert after.forward == before.forward and after.update == before.update
        for part in ("backward_input", "backward_weight", "backward"):
            assert getattr(after, part) == getattr(before, part) + before.forward


@pytest.mark.usefixtures("clock")
def test_recomputing_what_is_cheap_makes_weight_gradients_longer():
    setting = config(1)
    plain = profile_layers(setting)
    again = profile_layers(replace(setting, train=replace(setting.train, recompute="selective")))
    for factor, (before, after) in enumerate(zip(plain, again, strict=True), start=1):
        # The embedding has nothing to compute again; the others read the clock once more.
        more = factor * TICKS["recompute"] + 1 if factor > 1 else 0
        assert after == replace(before, backward_weight=before.backward_weight + more, backward=before.backward + more)


def test_the_cache_is_fresh_whole_and_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(costs_module, "CACHE_DIRECTORY", tmp_path)
    path = costs_module.cache_path(config(), 4)
    assert path != costs_module.cache_path(config(), 2)
    assert path != costs_module.cache_path(config(microbatch_size=3), 4)
    assert costs_module._read_fresh(path) is None
    costs_module.keep_costs(path, measured(head=2.0))
    content = costs_module._read_fresh(path)
    assert content is not None
    again = costs_module._parse(json.loads(content), from_cache=True)
    assert replace(again, from_cache=False) == measured(head=2.0)
    old = path.stat().st_mtime - 25 * 3600
    os.utime(path, (old, old))
    assert costs_module._read_fresh(path) is None
    for damage in (
        "",
        "{}",
        "[" * 100000,
        content.decode().replace('"message_s": 0.0', f'"message_s": {"9" * 401}'),
        content.decode().replace('"overhead": 1.0', '"overhead": 0'),
        content.decode().replace("2.0", "1e308"),
        content.decode().replace("2.0", "NaN"),
        content.decode().replace('"version": 1', '"version": 2'),
    ):
        path.write_text(damage)
        assert costs_module._read_fresh(path) is None
    path.unlink()
    # Whoever opened this would wait for a writer for ever.
    os.mkfifo(path)
    assert costs_module._read_fresh(path) is None
