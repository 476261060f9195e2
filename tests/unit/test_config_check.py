"""Checks across keys: what is filled in, and what each refusal says."""

from dataclasses import replace

import pytest

from hpcpipe.config.check import check_data, check_stages, resolve
from hpcpipe.config.schema import Config
from hpcpipe.config.threads import Node
from hpcpipe.errors import DamagedError, UsageError


def config(**sections: dict) -> Config:
    base = Config()
    return replace(base, **{name: replace(getattr(base, name), **keys) for name, keys in sections.items()})


def refusal(world_size: int, **sections: dict) -> str:
    with pytest.raises(UsageError) as caught:
        resolved = resolve(config(**sections), world_size)
        check_stages(resolved, resolved.parallel.pipeline)
    return str(caught.value)


@pytest.mark.parametrize(("world_size", "data", "pipeline"), [(1, 1, 1), (3, 1, 3), (4, 2, 2), (8, 8, 1)])
def test_pipeline_is_filled_in(world_size, data, pipeline):
    resolved = resolve(config(parallel={"data": data}), world_size)
    assert (resolved.parallel.pipeline, resolved.parallel.data) == (pipeline, data)


@pytest.mark.parametrize(
    ("microbatches", "data", "lanes"),
    [(8, 1, 4), (8, 2, 4), (8, 4, 4), (8, 8, 8), (6, 1, 2), (6, 2, 2), (6, 3, 3), (5, 1, 1), (5, 5, 5)],
)
def test_lanes_are_filled_in(microbatches, data, lanes):
    resolved = resolve(config(parallel={"microbatches": microbatches, "data": data}), data)
    assert resolved.parallel.lanes == lanes


def test_training_values_are_filled_in():
    resolved = resolve(config(train={"steps": 7}), 1)
    assert (resolved.train.decay_steps, resolved.train.precision) == (7, "f32")


def test_precision_goes_by_the_processor_unless_it_is_set():
    assert resolve(config(), 1, has_bf16_unit=True).train.precision == "bf16"
    assert resolve(config(train={"precision": "f32"}), 1, has_bf16_unit=True).train.precision == "f32"
    assert resolve(config(train={"precision": "bf16"}), 1).train.precision == "bf16"


def test_hangs_need_not_be_looked_for():
    for hang_s in (0.0, 2.0, 600.0):
        assert resolve(config(recovery={"hang_s": hang_s}), 1).recovery.hang_s == hang_s


@pytest.mark.parametrize("steps", [10, 1000])
def test_a_resolved_configuration_resolves_to_itself(steps):
    resolved = resolve(config(train={"steps": steps}), 4)
    assert resolve(resolved, 4) == resolved


@pytest.mark.parametrize(
    ("world_size", "sections", "words"),
    [
        (1, {"recovery": {"hang_s": 0.5}}, ["recovery.hang_s = 0.5", "to 2 or more", "0 so that"]),
        (
            4,
            {"parallel": {"pipeline": 3, "data": 2}},
            ["parallel.pipeline = 3 x parallel.data = 2 needs 6 ranks", "-n 6"],
        ),
        (1, {"parallel": {"pipeline": 2}}, ["needs 2 ranks, and 1 rank started", "-n 2"]),
        (4, {"parallel": {"data": 3}}, ["parallel.data = 3 does not divide", "4: start with `-n 6`"]),
        (7, {"parallel": {"pipeline": 2}}, ["7 ranks started", "-n 2"]),
        (
            4,
            {"model": {"layers": 2}},
            ["model.layers = 2 is too few for parallel.pipeline = 4 stages", "set parallel.pipeline = 2"],
        ),
        (
            6,
            {"parallel": {"data": 3, "microbatches": 8}},
            ["parallel.microbatches = 8", "parallel.data = 3", "6 or 9", "parallel.pipeline = 3"],
        ),
        (
            4,
            {"parallel": {"data": 4, "microbatches": 3}},
            ["parallel.microbatches = 4,", "and parallel.data = 1"],
        ),
        (2, {"parallel": {"partition": (1, 1, 2)}}, ["[1, 1, 2] has 3 entries for 2 stages", "[2, 2]"]),
        (2, {"parallel": {"partition": (1, 2)}}, ["adds up to 3 layers, and model.layers = 4"]),
        (2, {"parallel": {"partition": (0, 4)}}, ["[0, 4] leaves stage 0 without a layer", "only the last"]),
        (3, {"parallel": {"partition": (4, 0, 0)}}, ["[4, 0, 0] leaves stage 1 without a layer"]),
        (2, {"parallel": {"partition": "even"}}, ['parallel.partition = "even"', '"auto"']),
        (3, {"model": {"layers": 7}, "parallel": {"partition": (7,)}}, ["for example to [3, 2, 2]"]),
        (
            1,
            {"model": {"width": 130}},
            ["model.width = 130", "model.heads = 4", "128 or 132", "model.heads = 2"],
        ),
        (1, {"model": {"width": 2, "heads": 3}}, ["model.width = 3,", "model.heads = 2"]),
        (1, {"model": {"kind": "llama"}}, ['model.kind = "llama"', '"gpt2"']),
        (1, {"parallel": {"lanes": 3}}, ["parallel.lanes = 3", "microbatches = 8", "1, 2, 4, 8"]),
        (
            2,
            {"parallel": {"lanes": 1, "data": 2}},
            ["parallel.lanes = 1", "multiple of parallel.data = 2", "2, 4, 8"],
        ),
        (1, {"parallel": {"timeout_s": 0.0}}, ["parallel.timeout_s = 0.0", "above 0"]),
        (1, {"train": {"precision": "f16"}}, ['train.precision = "f16"', '"auto" or "bf16" or "f32"']),
        (1, {"train": {"recompute": "some"}}, ["train.recompute", '"none" or "selective" or "full"']),
        (1, {"train": {"steps": 0}}, ["train.steps = 0", "at least 1"]),
        (1, {"train": {"betas": (0.9, 1.0)}}, ["train.betas = [0.9, 1.0]", "1"]),
        (1, {"train": {"learning_rate": 1e-5}}, ["train.min_learning_rate = 0.0001", "1e-05"]),
        (1, {"train": {"decay_steps": 20}}, ["train.decay_steps = 20", "train.warmup_steps = 50"]),
        (1, {"data": {"validation_fraction": 1.0}}, ["data.validation_fraction = 1.0", "between 0 and 1"]),
        (1, {"data": {"validation_fraction": 0.0}}, ["data.validation_fraction = 0.0"]),
        (1, {"data": {"source": ""}}, ["data.source", "data.file"]),
        (1, {"model": {"context": 0}}, ["model.context = 0", "at least 1"]),
        (1, {"model": {"heads": 0}}, ["model.heads = 0"]),
        (1, {"parallel": {"data": 0}}, ["parallel.data = 0"]),
        (1, {"telemetry": {"console": "loud"}}, ["telemetry.console", '"terminal"', '"quiet"']),
    ],
)
def test_refusals_name_keys_numbers_and_cure(world_size, sections, words):
    message = refusal(world_size, **sections)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("num_ranks", "num_cores", "threads", "chosen"),
    [(1, 8, 0, 8), (3, 8, 0, 2), (8, 2, 0, 1), (8, 2, 4, 4), (2, 8, 1, 1), (2, 256, 128, 128), (2, 2, 64, 64)],
)
def test_threads_are_filled_in_and_may_be_more_than_cores(num_ranks, num_cores, threads, chosen):
    node = Node(num_ranks, num_cores)
    resolved = resolve(config(parallel={"threads": threads}), 1, node=node)
    assert resolved.parallel.threads == chosen
    assert resolve(resolved, 1, node=node) == resolved


def test_threads_of_a_node_that_is_not_known():
    assert resolve(config(), 1).parallel.threads == 1
    assert resolve(config(parallel={"threads": 4096}), 1).parallel.threads == 4096


def test_far_more_threads_than_cores_are_refused():
    with pytest.raises(UsageError) as caught:
        resolve(config(parallel={"threads": 65}), 1, node=Node(2, 6))
    for words in ("parallel.threads = 65 x 2 ranks", "6 cores", "parallel.threads = 3, or 0"):
        assert words in str(caught.value)


def test_the_head_may_be_a_stage_of_its_own():
    resolved = resolve(config(model={"layers": 3}, parallel={"partition": (1, 2, 0)}), 3)
    assert check_stages(resolved, 3).parallel.partition == (1, 2, 0)
    assert check_stages(resolve(config(model={"layers": 3}), 4), 4).parallel.pipeline == 4


def test_chunks_are_filled_in_and_need_layers():
    resolved = resolve(config(model={"layers": 7}), 3)
    assert check_stages(resolved, 6).parallel.chunks == 2
    with pytest.raises(UsageError, match=r"too few for 9 stages \(parallel.pipeline = 3, 3 on each rank\).*-n 2"):
        check_stages(resolved, 9)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_suggested_grid_is_accepted(world_size):
    message = refusal(world_size, parallel={"pipeline": 5, "data": 7})
    suggestion = message.split("parallel.pipeline = ")[-1].split(" for ")[0]
    pipeline, data = (int(part) for part in suggestion.split(" and parallel.data = "))
    resolve(config(parallel={"pipeline": pipeline, "data": data}), world_size)


def test_an_odd_number_of_layers_fits_any_degree_up_to_it():
    for stages in range(1, 8):
        assert resolve(config(model={"layers": 7}), stages).parallel.pipeline == stages


def test_vocabulary_is_taken_from_the_tokenizer_or_may_be_larger():
    assert check_data(config(), 259).model.vocab == 259
    assert check_data(config(model={"vocab": 259}), 259, 258).model.vocab == 259
    assert check_data(config(model={"vocab": 320}), 259).model.vocab == 320


def test_a_vocabulary_smaller_than_the_datas_is_refused():
    with pytest.raises(UsageError, match=r"model\.vocab = 100 is smaller than the 259 .* set model\.vocab = 259"):
        check_data(config(model={"vocab": 100}), 259)


def test_ids_beyond_the_tokenizer_are_damage():
    with pytest.raises(DamagedError, match=r"token id 259.*259 ids"):
        check_data(config(), 259, 259)
