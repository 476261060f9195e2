"""Layers with bfloat16 operands: close to float32, and the same bits however their work is shared or cut."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcpipe.config.schema import ModelConfig
from hpcpipe.kernels.threads import ALONE, Team
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.initial import fill_initial
from hpcpipe.model.layer import Microbatch
from hpcpipe.pipeline.parameters import Parameters
from hpcpipe.pipeline.stage import Stage

MODELS = [
    ModelConfig(layers=2, width=64, heads=2, context=64, vocab=257, tied=True),
    ModelConfig(layers=1, width=72, heads=3, context=50, vocab=77, tied=False),
    ModelConfig(layers=2, width=10, heads=2, context=7, vocab=11, tied=True),
]
BATCH = 3


def microbatch(model):
    generator = np.random.default_rng(7)
    tokens, targets = generator.integers(0, model.vocab, (2, BATCH, model.context)).astype(np.int32)
    coefficients = np.ones((BATCH, model.context), np.float32)
    coefficients[0, -2:], targets[0, -2:] = 0.0, -1
    return Microbatch(tokens, targets, coefficients)


def run(model, precision, team=ALONE, recompute="none", split=False):
    """Return the loss and the gradients of two microbatches, the second forward before the first backward."""
    layers = build_layers(model, precision)
    parameters = Parameters(layers)
    for tensor in parameters.layout.stored:
        fill_initial(tensor, 5, parameters.weights.arrays[tensor.name])
    parameters.packed.pack(team)
    stage = Stage(layers, parameters, BATCH, model.context, model.width, recompute, team)
    gradients = parameters.new_gradients()
    of_layers = [
        {tensor.name.removeprefix(layer.prefix): gradients.arrays[tensor.name] for tensor in layer.tensors}
        for layer in layers
    ]
    x, d, data = stage.new_stream(), stage.new_stream(), microbatch(model)
    stashes = [stage.new_stash(), stage.new_stash()]
    for stash in stashes:
        stage.forward(data, x, d, stash, lambda: None)
    for stash in stashes:
        if split:
            upstream = stage.new_upstream()
            stage.backward_input(data, x, d, stash, upstream, lambda: None)
            stage.backward_weight(data, x, stash, upstream, of_layers, lambda: None)
        else:
            stage.backward(data, x, d, stash, stage.shared_upstream(), of_layers, lambda: None)
    return data.loss, gradients.arrays


def digest(result):
    loss, gradients = result
    content = hashlib.sha256(loss.hex().encode())
    for array in gradients.values():
        content.update(array.tobytes())
    return content.hexdigest()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"width {model.width}")
def test_loss_and_gradients_are_those_of_float32_but_for_rounding(model):
    loss, gradients = run(model, "bf16")
    exact_loss, exact = run(model, "f32")
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    for name, gradient in exact.items():
        norm = np.linalg.norm(gradient)
        assert np.linalg.norm(gradients[name] - gradient) <= 0.03 * norm + 1e-6, name
        assert norm > 0, name


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"width {model.width}")
def test_bits_are_the_same_for_threads_halves_and_recomputation(model):
    plain = digest(run(model, "bf16"))
    for num_threads in (2, 3, 4):
        team = Team(num_threads)
        assert digest(run(model, "bf16", team)) == plain, num_threads
        team.close()
    assert digest(run(model, "bf16", split=True)) == plain
    for recompute in ("selective", "full"):
        assert digest(run(model, "bf16", recompute=recompute)) == plain
    assert digest(run(model, "bf16", recompute="selective", split=True)) == plain
    assert digest(run(model, "bf16", recompute="full", split=True)) == plain


def test_what_buffers_held_before_does_not_matter():
    """Memory is shared between buffers, so nothing may be read that was not written."""
    model = MODELS[0]
    plain = digest(run(model, "bf16"))
    layers = build_layers(model, "bf16")
    assert {name for layer in layers for name in layer.packed}
    parameters = Parameters(layers)
    for tensor in parameters.layout.stored:
        fill_initial(tensor, 5, parameters.weights.arrays[tensor.name])
    parameters.packed.pack(ALONE)
    stage = Stage(layers, parameters, BATCH, model.context, model.width)
    gradients = parameters.new_gradients()
    of_layers = [
        {tensor.name.removeprefix(layer.prefix): gradients.arrays[tensor.name] for tensor in layer.tensors}
        for layer in layers
    ]
    x, d, data = stage.new_stream(), stage.new_stream(), microbatch(model)
    for _ in range(2):
        stash, upstream = stage.new_stash(), stage.new_upstream()
        for arrays in (*stash.layers, *upstream):
            for array in arrays.values():
                array.view(np.uint8).fill(0xFF)
        stage.forward(data, x, d, stash, lambda: None)
        stage.backward_input(data, x, d, stash, upstream, lambda: None)
        stage.backward_weight(data, x, stash, upstream, of_layers, lambda: None)
    assert digest((data.loss, gradients.arrays)) == plain


def test_compiling_and_loading_give_the_same_bits(tmp_path):
    # The rank that compiles runs code from memory, the others what it wrote to the cache.
    code = "import test_model_bf16 as t\nprint([t.digest(t.run(model, 'bf16')) for model in t.MODELS])"
    paths = os.pathsep.join(path for path in (str(Path(__file__).parent), os.environ.get("PYTHONPATH")) if path)
    environ = {**os.environ, "HPCPIPE_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    environ.pop("NUMBA_CACHE_DIR", None)
    compiled, loaded = (
        subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert compiled == loaded
    assert compiled.count("'") == 2 * len(MODELS)
