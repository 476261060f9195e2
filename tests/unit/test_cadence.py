"""When a checkpoint is due."""

import pytest

from hpcpipe.config.interval import Interval, parse_interval
from hpcpipe.errors import UsageError
from hpcpipe.train.cadence import NODE_MTBF_S, Cadence, Costs, best_interval_s, estimate_mtbf_s

HOUR_S = 3600.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, Interval()),
        (50, Interval(steps=50)),
        ("15 minutes", Interval(seconds=900)),
        ("1 minute", Interval(seconds=60)),
        ("1.5 hours", Interval(seconds=5400)),
        (" 90 seconds ", Interval(seconds=90)),
        ("auto", Interval(is_auto=True)),
    ],
)
def test_an_interval_is_read(value, expected):
    assert parse_interval("checkpoint.every", value) == expected


@pytest.mark.parametrize(
    "value", ["", "never", "15", "15 min", "-3 minutes", "0 hours", "1e3 seconds", "15 minutes ago"]
)
def test_other_text_is_refused_with_what_is_expected(value):
    with pytest.raises(UsageError, match=r"checkpoint\.every = .*15 minutes.*auto"):
        parse_interval("checkpoint.every", value)


def test_steps_are_counted_alike_on_every_rank():
    cadence = Cadence(Interval(steps=4), 1.0, 0.0)
    assert [step for step in range(1, 13) if cadence.is_due_by_step(step)] == [4, 8, 12]
    assert not cadence.is_due_by_time(1e9)
    assert not Cadence(Interval(), 1.0, 0.0).is_due_by_step(0)


def test_time_counts_from_the_last_checkpoint():
    cadence = Cadence(Interval(seconds=60), 1.0, 100.0)
    assert [cadence.is_due_by_time(now) for now in (100, 159.9, 160)] == [False, False, True]
    cadence.took(170.0)
    assert [cadence.is_due_by_time(now) for now in (229, 231)] == [False, True]
    assert not cadence.is_due_by_step(60)


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(steps=7), "every 7 steps"),
        (Interval(seconds=90), "every 90 s"),
        (Interval(), "at the end only"),
        (Interval(is_auto=True), "as often as pays off with a failure every 3 hours, now every 30 s"),
    ],
)
def test_it_can_be_said(interval, words):
    assert Cadence(interval, 3 * HOUR_S, 0.0).describe() == words


def test_the_best_interval_is_youngs():
    """Lost are cost per interval, and half an interval per failure: the sum is least at the returned one."""

    def lost(interval_s):
        return 2.0 / interval_s + interval_s / 2 / (3 * HOUR_S)

    best = best_interval_s(2.0, 3 * HOUR_S)
    assert best == pytest.approx(207.8, abs=0.1)
    assert lost(best) < min(lost(0.9 * best), lost(1.1 * best))


def test_the_best_interval_has_limits():
    assert best_interval_s(0.0, HOUR_S) == 30
    assert best_interval_s(100.0, 1e9) == HOUR_S


def test_measured_cost_decides_where_nothing_else_is_asked_for():
    auto, fixed = (
        Cadence(Interval(is_auto=is_auto, seconds=0 if is_auto else 60), 3 * HOUR_S, 0.0) for is_auto in (1, 0)
    )
    for cadence in (auto, fixed):
        cadence.learn(2.0)
    assert auto.seconds == best_interval_s(2.0, 3 * HOUR_S)
    assert fixed.seconds == 60


def events(text):
    """Return events a minute apart: s started, c checkpoint, p stopped, d done."""
    names = {"s": "started", "c": "checkpoint", "p": "stopped", "d": "done"}
    return [{"time": f"2026-11-21T17:{i:02d}:00Z", "event": names[letter]} for i, letter in enumerate(text)]


def test_the_mean_time_between_failures_starts_from_the_nodes():
    assert estimate_mtbf_s(1, []) == NODE_MTBF_S
    assert estimate_mtbf_s(64, []) == NODE_MTBF_S / 64


@pytest.mark.parametrize(
    ("text", "minutes", "failures"),
    [("s", 0, 0), ("sp", 1, 0), ("spsd", 2, 0), ("sccss", 2, 2), ("sccspsc", 4, 1), ("cscp", 2, 0), ("sps", 1, 0)],
)
def test_starts_without_an_end_count_as_failures(text, minutes, failures):
    expected = (NODE_MTBF_S / 10 + 60 * minutes) / (1 + failures)
    assert estimate_mtbf_s(10, events(text)) == pytest.approx(expected)


def test_events_that_say_nothing_are_passed_over():
    strange = [{}, {"event": "started"}, {"event": "x", "time": 3}, {"event": "y", "time": "yesterday"}]
    assert estimate_mtbf_s(1, strange) == NODE_MTBF_S


def test_the_cost_of_writing_is_what_steps_take_longer():
    costs = Costs()
    for _ in range(20):
        costs.add(1.0, is_writing=False)
    for _ in range(4):
        costs.add(1.5, is_writing=True)
    assert costs.take_slowdown_s() == pytest.approx(2.0)
    assert costs.take_slowdown_s() == 0
    costs.add(0.5, is_writing=True)
    assert costs.take_slowdown_s() == 0
