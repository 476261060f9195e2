"""Precision is chosen, said and kept: in the log, in ``config.toml``, and over a restart."""

import json

import pytest
from support.commands import step_rows
from support.runs import Runs


@pytest.mark.parametrize(("precision", "words"), [("bf16", "bfloat16 kernels"), ("f32", "float32 kernels")])
def test_it_is_said_and_kept(runs: Runs, precision: str, words: str) -> None:
    finished = runs.train("run", 2, "train.steps=2", f"train.precision={precision}", "telemetry.console=lines")
    assert finished.code == 0, finished.stderr
    assert words in finished.stdout
    assert f'\nprecision = "{precision}"\n' in (runs.directory("run") / "config.toml").read_text()


def test_any_processor_computes_bfloat16(runs: Runs) -> None:
    found = {}
    for family in (None, "vector"):
        environ = {} if family is None else {"HPCPIPE_KERNELS": family}
        settings = ("train.precision=bf16", "train.steps=5", "telemetry.console=lines")
        finished = runs.train(str(family), 1, *settings, environ=environ)
        assert finished.code == 0, finished.stderr
        found[family] = [float(row["loss"]) for row in step_rows(runs.directory(str(family)))]
    assert "matrix products by float32 vectors" in finished.stdout
    assert found["vector"] == pytest.approx(found[None], rel=1e-3)


def test_a_family_that_is_not_there_is_refused(runs: Runs) -> None:
    finished = runs.train("run", 2, "train.precision=bf16", environ={"HPCPIPE_KERNELS": "tensor-cores"})
    assert finished.code == 64
    assert finished.stderr.count("HPCPIPE_KERNELS = tensor-cores: on this processor it may be ") == 1


def test_another_precision_after_a_restart_is_said(runs: Runs) -> None:
    decay = "train.decay_steps=8"
    runs.train_well("run", 1, "train.steps=2", "train.precision=bf16", decay)
    finished = runs.train("run", 1, "train.steps=4", "train.precision=f32", decay, "telemetry.console=lines")
    assert finished.code == 0, finished.stderr
    assert "warning: train.precision was bf16 and is f32: the run will not continue bit for bit" in finished.stdout
    rows = [json.loads(line) for line in (runs.directory("run") / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_another_family_after_a_restart_is_said(runs: Runs) -> None:
    settings = ("train.precision=bf16", "train.decay_steps=8", "telemetry.console=lines")
    vector = {"HPCPIPE_KERNELS": "vector"}
    assert runs.train("run", 1, "train.steps=2", *settings, environ=vector).code == 0
    same = runs.train("run", 1, "train.steps=3", *settings, environ=vector)
    assert same.code == 0 and "bit for bit" not in same.stdout
    other = runs.train("run", 1, "train.steps=4", *settings)
    assert other.code == 0, other.stderr
    has_unit = "float32 vectors" not in other.stdout
    assert ("warning: family of kernels was vector and is " in other.stdout) is has_unit


def test_without_compiled_kernels_float32_is_chosen(runs: Runs) -> None:
    finished = runs.train("run", 1, "train.precision=bf16", environ={"NUMBA_DISABLE_JIT": "1"})
    assert finished.code == 64
    assert "NUMBA_DISABLE_JIT is set" in finished.stderr
