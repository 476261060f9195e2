"""A run that changes its grid at every restart has the rows of one that never stopped, to the letter."""

import json
from pathlib import Path

import pytest
from support.commands import events, status
from support.runs import Runs

NINE_LAYERS = ("model.layers=9",)
CHAIN = [(8, 1), (4, 1), (2, 2), (1, 1), (8, 1)]
"""Stages and replicas of each leg."""
STEPS_PER_LEG = 3


def text_of_rows(directory: Path) -> list[str]:
    """Return the rows of the metrics without what depends on the clock, as they stand in the file."""
    timed = ("step_s", "tokens_per_s", "mfu", "bubble")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.dumps({key: value for key, value in json.loads(line).items() if key not in timed}) for line in lines]


@pytest.mark.timeout(600)
def test_eight_four_two_by_two_one_and_eight_again(runs: Runs) -> None:
    num_steps = STEPS_PER_LEG * len(CHAIN)
    settings = (*NINE_LAYERS, f"train.steps={num_steps}", "train.decay_steps=20", "train.eval_every=5")
    settings += ("parallel.lanes=4", "checkpoint.every=100", "checkpoint.keep=0")
    whole = runs.train_well("whole", 2, *settings)
    directory = runs.directory("run")
    directory.mkdir(parents=True)
    for leg, (pipeline, data) in enumerate(CHAIN, 1):
        if leg < len(CHAIN):
            (directory / "halt").write_text(f"step {leg * STEPS_PER_LEG}\n")
        grid = (f"parallel.pipeline={pipeline}", f"parallel.data={data}")
        finished = runs.train("run", pipeline * data, *settings, *grid)
        assert finished.code == (75 if leg < len(CHAIN) else 0), finished.stderr
        assert status(directory)["step"] == leg * STEPS_PER_LEG
        assert text_of_rows(directory) == text_of_rows(whole)[: len(text_of_rows(directory))]
    assert text_of_rows(directory) == text_of_rows(whole)
    assert [event["step"] for event in events(directory, "resumed")] == [3, 6, 9, 12]
    finished = runs.hpcpipe(
        "checkpoint", "diff", *(path / f"checkpoints/step-{num_steps:08d}" for path in (whole, directory)), "--json"
    )
    differing = json.loads(finished.stdout)
    assert not differing.get("tensors"), differing
