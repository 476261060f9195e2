"""Spikes are seen, and the noise of a healthy run is none."""

import math

import pytest
from support.fresh import RANDOM

from hpcpipe.train.history import History, history_from
from hpcpipe.train.spikes import ALARM, GRAVE, LEAST_SEEN, WINDOW, SpikeWatch


def healthy(num_steps, noise=0.05):
    """Losses and norms as runs have them: a fall by a power law with noise, norms that vary by factors."""
    losses = [2.0 + 3.5 * (1 + step / 20) ** -0.4 + noise * RANDOM.standard_normal() for step in range(num_steps)]
    norms = [(0.4 + 2.0 * math.exp(-step / 60)) * math.exp(0.2 * RANDOM.standard_normal()) for step in range(num_steps)]
    return list(zip(losses, norms, strict=True))


def scores(series):
    watch = SpikeWatch()
    found = []
    for loss, norm in series:
        found.append(watch.score(loss, norm))
        watch.add(loss, norm)
    return found, watch


@pytest.mark.parametrize("noise", [0.0, 0.005, 0.05, 0.3])
def test_no_alarm_in_a_healthy_run(noise):
    found, watch = scores(healthy(3000, noise))
    assert max(found) < ALARM
    assert watch.num_spikes == 0


def test_warmup_and_a_slow_rise_are_no_spikes():
    rise = [(3.0 + 0.004 * step, 0.3 * 1.01**step) for step in range(400)]
    assert max(scores(rise)[0]) < ALARM


@pytest.mark.parametrize(("loss_times", "norm_times"), [(1.5, 1.0), (1.0, 60.0), (3.0, 60.0)])
def test_a_spike_is_seen_once_and_does_not_hide_the_next(loss_times, norm_times):
    series = healthy(600)
    for step in (300, 340):
        loss, norm = series[step]
        series[step] = loss * loss_times, norm * norm_times
    found, watch = scores(series)
    assert [step for step, score in enumerate(found) if score > ALARM] == [300, 340]
    assert found[300] > GRAVE
    assert watch.num_spikes == 0
    assert scores(series[:350])[1].num_spikes == 2


def test_a_fall_is_no_spike():
    series = [*healthy(200), (0.1, 1e-4)]
    assert scores(series)[0][-1] == 0.0


def test_too_few_steps_give_no_alarm():
    for seen, alarms in ((LEAST_SEEN - 1, False), (LEAST_SEEN, True)):
        assert (scores([*([(2.0, 0.5)] * seen), (9.0, 0.5)])[0][-1] > ALARM) is alarms


@pytest.mark.parametrize(("num_high", "is_alarm"), [(3, True), (6, False)])
def test_what_happens_all_the_time_is_no_spike(num_high, is_alarm):
    series = healthy(400)[-WINDOW:]
    for place in range(num_high):
        loss, norm = series[5 + 10 * place]
        series[5 + 10 * place] = loss + 2.0, norm
    high = max(loss for loss, _ in series)
    assert (scores([*series, (high, 0.4)])[0][-1] > ALARM) is is_alarm


def test_a_lasting_change_stops_being_a_spike():
    found, _ = scores([*healthy(300), *((loss + 1.0, norm) for loss, norm in healthy(300))])
    assert found[300] > ALARM
    assert max(found[300 + WINDOW :]) < ALARM


def test_norms_of_zero_do_not_matter():
    found, _ = scores([(2.0, 0.0)] * 50 + [(2.0, 1.0)])
    assert found[-1] > GRAVE
    assert max(found[:-1]) == 0.0


def test_the_score_depends_on_the_window_only():
    series = healthy(900)
    early, _ = scores(series)
    late, _ = scores(series[900 - 2 * WINDOW - 50 :])
    assert late[-50:] == early[-50:]


def test_what_is_known_of_earlier_steps():
    rows = [
        {"step": 1, "loss": 2.0, "grad_norm": 0.5},
        {"step": 1, "val_loss": 2.0},
        {"step": 2, "loss": None, "grad_norm": None, "skipped": True},
        {"step": 3, "loss": 1.5, "grad_norm": 0.25, "skipped": True},
        {"step": 4, "loss": None, "grad_norm": 1.0, "skipped": True},
        {"step": 5, "loss": 1.5, "grad_norm": None, "skipped": True},
        {"step": 6, "loss": 1.0, "grad_norm": 0.5},
    ]
    events = [
        {"event": "started"},
        {"event": "going back", "step": 5},
        {"event": "started"},
        {"event": "going back", "step": 9},
        {"event": "checkpoint", "step": 9},
    ]
    assert history_from(rows, events, 5) == History(((2.0, 0.5), (1.5, 0.25)), 2, (9,))
    assert history_from(rows, [], 6).num_skipped == 0
    assert history_from([], [], 0) == History()
    many = [{"step": step, "loss": 1.0 + step, "grad_norm": 1.0} for step in range(1, 1000)]
    assert len(history_from(many, [], 999).steps) == 2 * WINDOW
