"""The same bits from every grid and schedule: the texts in ``metrics.jsonl`` are equal, digit by digit."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import bits, step_rows
from support.runs import Runs

# Above the limit Open MPI fetches a message from its buffer when the receive is there, not when the send starts.
HARD = {"HPCPIPE_TEST_MESSAGES": "synchronous,delay=0.005", "OMPI_MCA_btl_sm_eager_limit": "128"}
TIED = {True: (), False: ("model.tied=false",)}
NINE_LAYERS = ("model.layers=9", "parallel.microbatches=8", "parallel.microbatch_size=1", "train.steps=12")


@pytest.fixture(scope="module")
def expected(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple[str, ...]]]:
    """Return a function that trains a model on one rank, once, and gives its bits."""
    known: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def train(*settings: str) -> list[tuple[str, ...]]:
        if settings not in known:
            runs = Runs(tmp_path_factory.mktemp("alone"), config)
            known[settings] = bits(runs.train_well("alone", 1, *settings))
        return known[settings]

    return train


def grid(pipeline: int, data: int, schedule: str, recompute: str = "none") -> tuple[str, ...]:
    return (
        f"parallel.pipeline={pipeline}",
        f"parallel.data={data}",
        f"parallel.schedule={schedule}",
        f"train.recompute={recompute}",
    )


def compare(runs: Runs, expected: Callable[..., list], num_ranks: int, model: tuple, parallel: tuple, environ) -> None:
    directory = runs.train_well("run", num_ranks, *model, *parallel, environ=environ)
    assert bits(directory) == expected(*model)


def test_the_comparison_can_fail(runs: Runs, expected) -> None:
    reference = expected()
    assert len(reference) == 21
    assert len({row[1] for row in reference}) == 21
    assert bits(runs.train_well("other", 1, "run.seed=2", "train.steps=1")) != reference[:1]


def test_gradients_are_clipped(runs: Runs) -> None:
    norms = [float(row["grad_norm"]) for row in step_rows(runs.train_well("run", 1, "train.steps=5"))]
    assert max(norms) > 1.0


@pytest.mark.parametrize(
    ("pipeline", "data", "schedule", "tied", "recompute", "environ"),
    [
        (1, 1, "gpipe", True, "full", {}),
        (2, 1, "1f1b", True, "none", HARD),
        (2, 1, "gpipe", False, "none", {}),
        (3, 1, "1f1b", False, "full", {}),
        (3, 1, "gpipe", True, "none", HARD),
        (4, 1, "1f1b", True, "full", {}),
        (4, 1, "gpipe", False, "none", {}),
        (1, 2, "1f1b", True, "none", {}),
        (2, 2, "1f1b", False, "none", HARD),
        (2, 2, "gpipe", True, "full", {}),
        (4, 2, "1f1b", True, "none", {}),
    ],
)
def test_grids_and_schedules(runs, expected, pipeline, data, schedule, tied, recompute, environ) -> None:
    parallel = grid(pipeline, data, schedule, recompute)
    compare(runs, expected, pipeline * data, TIED[tied], parallel, environ)


def test_eight_stages(runs: Runs, expected) -> None:
    compare(runs, expected, 8, NINE_LAYERS, grid(8, 1, "1f1b"), {})


@pytest.mark.parametrize(
    ("pipeline", "data", "schedule", "chunks", "environ"),
    [
        (2, 1, "zb-v", 2, HARD),
        (2, 2, "interleaved", 2, {}),
        (3, 1, "greedy", 3, {}),
        (4, 1, "interleaved-zb", 2, HARD),
    ],
)
def test_several_stages_per_rank(runs: Runs, expected, pipeline, data, schedule, chunks, environ) -> None:
    parallel = (*grid(pipeline, data, schedule), f"parallel.chunks={chunks}")
    compare(runs, expected, pipeline * data, NINE_LAYERS, parallel, environ)


@pytest.mark.parametrize(("pipeline", "threads"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)])
def test_threads(runs: Runs, expected, pipeline: int, threads: int) -> None:
    compare(runs, expected, pipeline, (), (f"parallel.threads={threads}",), {})
    assert f"\nthreads = {threads}\n" in (runs.directory("run") / "config.toml").read_text()


def test_a_partition_by_hand(runs: Runs, expected) -> None:
    compare(runs, expected, 3, (), ("parallel.partition=[1,3,1]",), {})


@pytest.mark.slow
@pytest.mark.parametrize("environ", [{}, HARD], ids=["", "synchronous"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pipeline", "data"), [*itertools.product([1, 2, 3, 4], [1]), (1, 2), (2, 2), (4, 2)])
def test_all_grids_and_schedules(runs, expected, pipeline, data, schedule, tied, recompute, environ) -> None:
    parallel = grid(pipeline, data, schedule, recompute)
    compare(runs, expected, pipeline * data, TIED[tied], parallel, environ)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pipeline", "data"), [(2, 1), (4, 1), (8, 1), (1, 4), (2, 4)])
def test_nine_layers(runs, expected, pipeline, data, schedule, tied) -> None:
    compare(runs, expected, pipeline * data, NINE_LAYERS + TIED[tied], grid(pipeline, data, schedule), {})
