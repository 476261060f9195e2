"""The model: gradients against an independent float64 forward, recomputation, partition, initial values."""

import itertools

import numpy as np
import pytest

from hpcpipe.config.schema import ModelConfig
from hpcpipe.memory.layout import new_memory
from hpcpipe.model.gpt2 import build_layers, count_parameters
from hpcpipe.model.initial import fill_initial
from hpcpipe.model.layer import Microbatch
from hpcpipe.model.partition import balance, balance_blocks, partition
from hpcpipe.pipeline.buffers import StageLayout
from hpcpipe.pipeline.parameters import Parameters
from hpcpipe.pipeline.stage import Stage

MODEL = ModelConfig(layers=2, width=12, heads=3, context=7, vocab=11, tied=True)
BATCH = 2


def microbatch(model, batch=BATCH, seed=3):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, model.vocab, (batch, model.context), dtype=np.int32)
    targets = generator.integers(0, model.vocab, (batch, model.context), dtype=np.int32)
    coefficients = np.ones((batch, model.context), np.float32)
    coefficients[0, -2:] = 0.0
    targets[0, -2:] = -1
    return Microbatch(tokens, targets, coefficients)


def make_stage(model, recompute="none", batch=BATCH):
    layers = build_layers(model)
    parameters = Parameters(layers)
    for tensor in parameters.layout.stored:
        array = parameters.weights.arrays[tensor.name]
        fill_initial(tensor, 5, array)
        # Away from the special starting values, so that every term of the gradient counts.
        array += np.random.default_rng(len(tensor.name)).normal(0, 0.2, array.shape).astype(np.float32)
    return Stage(layers, parameters, batch, model.context, model.width, recompute), parameters


def run(stage, parameters, data, split=False, between=lambda: None):
    """Return the loss and the gradients of one microbatch; `between` is called before each action but the first."""
    gradients = parameters.new_gradients()
    per_layer = [
        {tensor.name.removeprefix(layer.prefix): gradients.arrays[tensor.name] for tensor in layer.tensors}
        for layer in stage.layers
    ]
    x, out, d, stash = stage.new_stream(), stage.new_stream(), stage.new_stream(), stage.new_stash()
    stage.forward(data, x, out, stash, lambda: None)
    between()
    if split:
        upstream = stage.new_upstream()
        stage.backward_input(data, x, d, stash, upstream, lambda: None)
        between()
        stage.backward_weight(data, x, stash, upstream, per_layer, lambda: None)
    else:
        stage.backward(data, x, d, stash, stage.shared_upstream(), per_layer, lambda: None)
    return data.loss, gradients


def reference_loss(model, weights, data):
    """The GPT-2 forward written once more, straight from the definition, in float64."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / scale * weights[f"{name}/weight"] + weights[f"{name}/bias"]

    def linear(x, name):
        return x @ weights[f"{name}/weight"] + weights[f"{name}/bias"]

    heads, size = model.heads, model.width // model.heads
    x = weights["embedding/token/weight"][data.tokens] + weights["embedding/position/weight"]
    mask = np.triu(np.full((model.context, model.context), -np.inf), 1)
    for index in range(model.layers):
        prefix = f"layers/{index:03d}"
        qkv = linear(norm(x, f"{prefix}/norm1"), f"{prefix}/attention/qkv")
        q, k, v = (part.reshape(*part.shape[:2], heads, size).swapaxes(1, 2) for part in np.split(qkv, 3, axis=-1))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(size) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + linear(attended.swapaxes(1, 2).reshape(x.shape), f"{prefix}/attention/output")
        hidden = linear(norm(x, f"{prefix}/norm2"), f"{prefix}/mlp/up")
        gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(gelu, f"{prefix}/mlp/down")
    table = weights["embedding/token/weight" if model.tied else "head/weight"]
    logits = norm(x, "head/norm") @ table.T
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probabilities, np.maximum(data.targets, 0)[..., None], -1)[..., 0]
    return -(data.coefficients * chosen).sum()


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_of_every_tensor_against_finite_differences(tied):
    model = ModelConfig(layers=2, width=12, heads=3, context=7, vocab=11, tied=tied)
    stage, parameters = make_stage(model)
    data = microbatch(model)
    loss, gradients = run(stage, parameters, data)
    weights = {name: array.astype(np.float64) for name, array in parameters.weights.arrays.items()}
    assert loss == pytest.approx(reference_loss(model, weights, data), rel=1e-5)

    totals = {name: gradients.arrays[name].astype(np.float64) for name in gradients.arrays}
    if tied:
        totals["embedding/token/weight"] += totals.pop("head/weight")
    generator = np.random.default_rng(1)
    for name, gradient in totals.items():
        direction = generator.normal(size=gradient.shape)
        values = []
        for sign in (1, -1):
            shifted = dict(weights)
            shifted[name] = weights[name] + sign * 1e-5 * direction
            values.append(reference_loss(model, shifted, data))
        expected = (values[0] - values[1]) / 2e-5
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs((gradient * direction).sum() - expected) < 2e-5 * scale, name


def test_recomputing_and_splitting_the_backward_keep_the_bits():
    results = []
    for recompute, split in itertools.product(("none", "selective", "full"), (False, True)):
        stage, parameters = make_stage(MODEL, recompute)
        loss, gradients = run(stage, parameters, microbatch(MODEL), split)
        results.append((loss, gradients.flat.tobytes()))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_nothing_outlives_an_action_in_working_memory(recompute, split):
    """What is computed again comes from what is kept: all else is not a number when the backward begins."""
    stage, parameters = make_stage(MODEL, recompute)
    layout = StageLayout(stage.shape, is_forward_only=False, has_whole_backward=not split)
    memory = new_memory(layout.working_extent, "test")
    stage.bind(layout, memory)
    loss, gradients = run(stage, parameters, microbatch(MODEL), split, between=lambda: memory.plain.fill(0xFF))
    expected_loss, expected = run(*make_stage(MODEL), microbatch(MODEL))
    assert loss == expected_loss and gradients.flat.tobytes() == expected.flat.tobytes()


def test_selective_recomputation_keeps_what_is_costly():
    extents = {}
    for recompute in ("none", "selective", "full"):
        stage, _ = make_stage(MODEL, recompute)
        layout = StageLayout(stage.shape, is_forward_only=False, has_whole_backward=True)
        extents[recompute] = layout.kept_extent.plain
    cheap = sum(
        -(-spec.num_bytes // 64) * 64
        for layer in stage.layers
        for name, spec in layer.stash_shapes(BATCH).items()
        if name in ("normed", "normed1", "normed2", "activated")
    )
    stream = -(-4 * BATCH * MODEL.context * MODEL.width // 64) * 64
    assert extents["none"] - extents["selective"] == cheap > 0.3 * extents["none"]
    assert extents["full"] == stream * (len(stage.layers) - 1)


def test_a_sample_does_not_see_the_rest_of_its_batch():
    model = ModelConfig(layers=1, width=12, heads=3, context=7, vocab=11)
    logits = []
    for batch in (1, 2, 3):
        stage, _ = make_stage(model, batch=batch)
        data = microbatch(model, batch)
        data.tokens[0] = np.arange(model.context)
        stash = stage.new_stash()
        stage.forward(data, stage.new_stream(), stage.new_stream(), stash, lambda: None)
        logits.append(stash.layers[-1]["lse"][: model.context].copy())
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], rtol=1e-6)


def test_parameter_count_of_gpt2_124m():
    model = ModelConfig(layers=12, width=768, heads=12, context=1024, vocab=50257, tied=True)
    assert count_parameters(build_layers(model)) == 124_439_808


def test_initial_values_depend_on_seed_and_name_only():
    layers = build_layers(MODEL)
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    assert len({tensor.name for tensor in tensors}) == len(tensors)

    def values(tensor, seed):
        out = np.empty(tensor.shape, np.float32)
        fill_initial(tensor, seed, out)
        return out

    matrices = [tensor for tensor in tensors if tensor.initial_std and not tensor.tied_to]
    for first, second in itertools.combinations(matrices, 2):
        size = min(first.size, second.size)
        assert not np.array_equal(values(first, 1).flat[:size], values(second, 1).flat[:size])
    for tensor in matrices:
        np.testing.assert_array_equal(values(tensor, 1), values(tensor, 1))
        assert not np.array_equal(values(tensor, 1), values(tensor, 2))
        assert values(tensor, 1).std() == pytest.approx(tensor.initial_std, rel=0.3)
    tied = next(tensor for tensor in tensors if tensor.tied_to)
    np.testing.assert_array_equal(values(tied, 1), values(tensors[0], 1))


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 7, 12])
def test_partition_places_every_layer_once(num_blocks):
    layers = build_layers(ModelConfig(layers=num_blocks, width=12, heads=3, context=7, vocab=11))
    for num_stages in range(1, num_blocks + 2):
        ranges = partition(layers, num_stages)
        assert [index for part in ranges for index in part] == list(range(num_blocks + 2))
        # The head is small here, so that it is alone only where there is no block for it.
        blocks = [sum(0 < index <= num_blocks for index in part) for part in ranges]
        assert min(blocks[:-1], default=1) >= 1 and blocks[-1] >= (num_stages <= num_blocks)


def test_partition_by_hand():
    layers = build_layers(ModelConfig(layers=5, width=12, heads=3, context=7, vocab=11))
    assert partition(layers, 2, [1, 4]) == [range(2), range(2, 7)]
    assert partition(layers, 3, [2, 2, 1]) == [range(3), range(3, 5), range(5, 7)]
    assert partition(layers, 3, [2, 3, 0]) == [range(3), range(3, 6), range(6, 7)]


def test_balance_is_exact():
    generator = np.random.default_rng(0)
    for _ in range(200):
        costs = generator.integers(1, 9, generator.integers(1, 8)).tolist()
        num_stages = int(generator.integers(1, len(costs) + 1))

        def worst(counts, costs=costs):
            ends = np.cumsum(counts)
            return max(sum(costs[end - count : end]) for count, end in zip(counts, ends, strict=True))

        cuts = itertools.combinations(range(1, len(costs)), num_stages - 1)
        best = min(worst(np.diff([0, *cut, len(costs)]).tolist()) for cut in cuts)
        counts = balance(costs, num_stages)
        assert len(counts) == num_stages and sum(counts) == len(costs) and min(counts) >= 1
        assert worst(counts) == best


def test_a_heavy_head_gets_fewer_blocks():
    layers = build_layers(ModelConfig(layers=12, width=768, heads=12, context=1024, vocab=50257))
    sizes = [len(part) for part in partition(layers, 4)]
    assert sizes[0] > sizes[-1]
    assert balance_blocks([0.1, *[1.0] * 12, 5.4], 4) == [4, 4, 4, 0]


def test_an_even_cut_wins_among_those_with_the_same_largest_part():
    assert balance([1, 1, 1, 1, 1, 0.1], 4) == [2, 1, 1, 2]
    assert balance([1] * 10, 4) == [3, 3, 2, 2]
