"""Runs that decide for themselves: costs, prediction, partition and schedule are in the run directory."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from support.commands import bits
from support.runs import Runs

from hpcpipe.kernels.jit import CACHE_DIRECTORY


def prediction(directory: Path) -> dict:
    return json.loads((directory / "prediction.json").read_text())


def test_auto_chooses_says_why_and_gives_the_same_bits(runs: Runs, finished_run: Path) -> None:
    finished = runs.train("run", 2, 'parallel.schedule="auto"')
    assert finished.code == 0, finished.stderr
    directory = runs.directory("run")
    assert bits(directory) == bits(finished_run)
    found = prediction(directory)
    names = {candidate["schedule"] for candidate in found["candidates"]}
    assert names | {reason.split(",")[0] for reason in found["refused"]} >= {"1f1b", "zb-h1", "interleaved", "greedy"}
    assert f"> {found['schedule']}" in finished.stdout
    resolved = tomllib.loads((directory / "config.toml").read_text())["parallel"]
    assert resolved["schedule"] == found["schedule"] != "auto"
    assert resolved["partition"] == found["partition"] and sum(found["partition"]) == 5
    checked = runs.hpcpipe("schedule", "check", directory / "schedule.csv")
    assert checked.code == 0, checked.stderr
    again = runs.train_well("again", 2, f"parallel.schedule={directory / 'schedule.csv'}", "train.steps=3")
    assert bits(again)[:3] == bits(finished_run)[:3]


def test_the_prediction_is_there_before_the_first_step(runs: Runs) -> None:
    # The first step makes numbers that are not finite, so that no step is ever finished.
    finished = runs.train("run", 2, "train.learning_rate=1e38", "train.min_learning_rate=0", "train.warmup_steps=0")
    assert finished.code == 70
    found = prediction(runs.directory("run"))
    parts = found["pipeline_s"] + found["update_s"] + found["exchange_s"]
    assert 0 < found["step_s"] == pytest.approx(parts * found["costs"]["overhead"])
    assert found["costs"]["block"]["forward"] > found["costs"]["embedding"]["forward"] > 0


def test_costs_are_measured_once_refined_by_a_run_and_compared_at_its_end(runs: Runs) -> None:
    cache = {"HPCPIPE_CACHE_DIR": str(runs.root / "cache")}
    copy = runs.root / "cache" / "hpcpipe" / CACHE_DIRECTORY.name
    shutil.copytree(CACHE_DIRECTORY, copy, ignore=shutil.ignore_patterns("costs"))
    first, second, third = (
        runs.train_well(name, 2, f"train.steps={steps}", environ=cache)
        for name, steps in (("first", 2), ("second", 12), ("third", 2))
    )
    assert not prediction(first)["costs_from_cache"] and prediction(second)["costs_from_cache"]
    assert prediction(second)["costs"] == prediction(first)["costs"]
    rehearsed, refined = (prediction(directory)["costs"] for directory in (first, third))
    for kind in ("embedding", "block", "head"):
        before, after = rehearsed[kind], refined[kind]
        assert after["forward"] != before["forward"] and after["update"] == before["update"]
        # Whole backwards do not tell the halves apart: all three parts grow by the factor of what was seen.
        for part in ("backward_input", "backward_weight"):
            share, known = after[part] / after["backward"], before[part] / before["backward"]
            assert share == pytest.approx(known, rel=1e-12)
    events = [json.loads(line) for line in (second / "events.jsonl").read_text().splitlines()]
    compared = next(event for event in events if event["event"] == "step time")
    assert compared["predicted_s"] == prediction(second)["step_s"]
    overhead = compared["measured_s"] / compared["explained_s"]
    assert rehearsed["overhead"] == 1 <= refined["overhead"] <= 1.25
    assert refined["overhead"] == pytest.approx(min(max(overhead, 1), 1.25), rel=1e-12)
    assert refined["message_s"] == rehearsed["message_s"]


def test_greedy_runs_with_measured_costs_and_the_head_alone(runs: Runs, finished_run: Path) -> None:
    settings = ("parallel.schedule=greedy", "parallel.chunks=1", "parallel.partition=[3,2,0]")
    assert bits(runs.train_well("run", 3, *settings)) == bits(finished_run)
