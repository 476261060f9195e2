"""The optimizer: learning rate, clipping, and sums whose bits do not depend on the number of replicas."""

import math

import numpy as np
import pytest

from hpcpipe.config.schema import ModelConfig, TrainConfig
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.mpi.collectives import tree_sum
from hpcpipe.optim.adamw import MOMENTS, AdamW
from hpcpipe.optim.clip import clip_factor, global_norm
from hpcpipe.optim.lanes import GradientLanes
from hpcpipe.optim.learning_rate import learning_rate
from hpcpipe.pipeline.parameters import Parameters

TRAIN = TrainConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, decay_steps=110)


def test_learning_rate_rises_falls_and_stays():
    assert learning_rate(TRAIN, 1) == pytest.approx(0.1)
    assert learning_rate(TRAIN, 10) == 1.0
    assert learning_rate(TRAIN, 60) == pytest.approx(0.55)
    assert learning_rate(TRAIN, 110) == learning_rate(TRAIN, 10_000) == 0.1
    rates = [learning_rate(TRAIN, step) for step in range(10, 112)]
    assert rates == sorted(rates, reverse=True)


def test_learning_rate_without_warmup_starts_near_the_peak():
    train = TrainConfig(learning_rate=1.0, min_learning_rate=0.0, warmup_steps=0, decay_steps=1000)
    assert learning_rate(train, 1) == pytest.approx(1.0, abs=1e-5)


def test_the_norm_adds_in_order_and_clips():
    assert global_norm([9.0, 16.0], 5.0) == 1.0
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == clip_factor(4.0, 0.0) == 1.0
    assert math.isnan(global_norm([float("nan")], 1.0))


def add_up(num_lanes, contributions):
    """Feed one random gradient per microbatch through lanes and return the sum's bits."""
    parameters = Parameters(build_layers(ModelConfig(layers=1, width=4, heads=2, context=3, vocab=5)))
    lanes = GradientLanes(parameters.new_gradients, num_lanes, len(contributions))
    for _ in range(2):  # the second step must not see the first
        for index, contribution in enumerate(contributions):
            lanes.current(index).flat[:] += contribution[: lanes.current(index).flat.size]
            lanes.finished(index)
        total = lanes.total().flat.copy()
        lanes.reset()
    return total


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4, 5, 6, 7, 8])
def test_lanes_add_everything_once(num_lanes):
    contributions = [np.full(2000, 2.0**index, np.float32) for index in range(2 * num_lanes)]
    assert (add_up(num_lanes, contributions) == 2.0 ** (2 * num_lanes) - 1).all()


@pytest.mark.parametrize("num_replicas", [1, 2, 4, 8])
def test_replicas_of_aligned_lanes_have_the_bits_of_one(num_replicas):
    generator = np.random.default_rng(0)
    contributions = [generator.normal(size=2000).astype(np.float32) for _ in range(16)]
    expected = add_up(8, contributions)
    per_replica = 16 // num_replicas
    parts = [
        add_up(8 // num_replicas, contributions[replica * per_replica : (replica + 1) * per_replica])
        for replica in range(num_replicas)
    ]
    assert tree_sum(parts).tobytes() == expected.tobytes()


def test_adamw_decays_matrices_only_and_moves_against_the_gradient():
    parameters = Parameters(build_layers(ModelConfig(layers=1, width=4, heads=2, context=3, vocab=5)))
    stored = parameters.layout.stored
    parameters.weights.flat.fill(1.0)
    moments = {moment: parameters.new_gradients().arrays for moment in MOMENTS}
    optimizer = AdamW(stored, moments, TrainConfig(weight_decay=0.5))
    gradients = parameters.new_gradients().arrays
    for tensor in stored:
        gradients[tensor.name].fill(3.0 if tensor.name == "head/norm/bias" else 0.0)
    optimizer.update(parameters.weights.arrays, gradients, 1, 1.0, 0.1)
    for tensor in stored:
        weight = parameters.weights.arrays[tensor.name]
        expected = 0.9 if tensor.name == "head/norm/bias" else 0.95 if len(tensor.shape) > 1 else 1.0
        np.testing.assert_allclose(weight, expected, rtol=1e-6)
