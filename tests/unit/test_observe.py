"""What kernels have to do, and the observer that counts their calls: nothing is missed and nothing counts twice."""

import numpy as np
import pytest

from hpcpipe.config.schema import ModelConfig
from hpcpipe.kernels.cases import cases
from hpcpipe.kernels.observe import ObservedTeam, Observer
from hpcpipe.kernels.reduce import add_into, sum_of_squares
from hpcpipe.kernels.work import work_of
from hpcpipe.model.gpt2 import build_layers
from hpcpipe.model.initial import fill_initial
from hpcpipe.model.layer import Microbatch
from hpcpipe.pipeline.parameters import Parameters
from hpcpipe.pipeline.stage import Stage

MODEL = ModelConfig(layers=3, width=36, heads=3, context=40, vocab=70, tied=False)
BATCH = 2
MEASURES_THE_MACHINE = {"repeat_block"}


def observe_microbatch(precision, num_threads):
    """Run a model forward and backward, and return what was counted."""
    observer = Observer()
    team = ObservedTeam(observer, num_threads)
    layers = build_layers(MODEL, precision)
    parameters = Parameters(layers)
    for tensor in parameters.layout.stored:
        fill_initial(tensor, 5, parameters.weights.arrays[tensor.name])
    parameters.packed.pack(team)
    stage = Stage(layers, parameters, BATCH, MODEL.context, MODEL.width, "none", team)
    gradients = parameters.new_gradients()
    of_layers = [
        {tensor.name.removeprefix(layer.prefix): gradients.arrays[tensor.name] for tensor in layer.tensors}
        for layer in layers
    ]
    ids = np.random.default_rng(3).integers(0, MODEL.vocab, (2, BATCH, MODEL.context)).astype(np.int32)
    microbatch = Microbatch(*ids, np.ones((BATCH, MODEL.context), np.float32))
    x, d, stash = stage.new_stream(), stage.new_stream(), stage.new_stash()
    assert observer.kernels == {}
    with observer.watch():
        stage.forward(microbatch, x, d, stash, lambda: None)
        stage.backward(microbatch, x, d, stash, stage.shared_upstream(), of_layers, lambda: None)
    team.close()
    return observer.kernels


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_every_kernel_of_a_step_is_known(precision):
    for function, arguments in cases(precision):
        work = work_of(function.__name__, arguments)
        if function.__name__ not in MEASURES_THE_MACHINE:
            assert work is not None, f"{function.__name__} is missing in hpcpipe.kernels.work"
            assert work.num_bytes > 0
    assert work_of("no_such_kernel", ()) is None


@pytest.mark.parametrize(("precision", "num_threads"), [("f32", 1), ("bf16", 1), ("bf16", 2)])
def test_the_operations_of_a_microbatch_are_those_of_the_model(precision, num_threads):
    kernels = observe_microbatch(precision, num_threads)
    rows, width = BATCH * MODEL.context, MODEL.width
    attention = {name: tally for name, tally in kernels.items() if name.startswith("attention")}
    products = sum(tally.work.flops for name, tally in kernels.items() if name not in attention)
    assert products == 3 * rows * (MODEL.layers * 24 * width**2 + 2 * width * MODEL.vocab)
    # A query sees the keys up to its own: two products forward, five backward.
    pairs = BATCH * MODEL.context * (MODEL.context + 1) / 2
    assert [tally.work.flops for tally in attention.values()] == [
        MODEL.layers * count * 2 * width * pairs for count in (2, 5)
    ]
    assert all(tally.seconds > 0 and tally.work.num_bytes > 0 for tally in kernels.values())
    assert [tally.calls for tally in attention.values()] == [MODEL.layers, MODEL.layers]
    assert not {"transpose", "exchange"} & set(kernels)


def test_bytes_are_those_of_operands_and_results():
    rows, inputs, outputs = 64, 32, 96
    x, d = np.zeros((rows, inputs), np.uint16), np.zeros((rows, outputs), np.uint16)
    gradient = np.zeros((inputs, outputs), np.float32)
    scratch = np.zeros((32, 64), np.uint16)
    work = work_of("weight_gradient", (x, d.reshape(-1), gradient, scratch, 0, inputs))
    assert work == (2 * rows * inputs * outputs, x.nbytes + d.nbytes + 2 * gradient.nbytes)
    tokens, table = np.zeros((2, 8), np.int32), np.zeros((1000, 4), np.float32)
    positions, out = np.zeros((8, 4), np.float32), np.zeros((16, 4), np.float32)
    # Sixteen rows of the table are read, not a thousand.
    forward = work_of("embedding_forward", (tokens, table, positions, out))
    assert forward == (0, tokens.nbytes + 2 * out.nbytes + positions.nbytes)


def test_what_threads_share_is_one_call_and_its_time_is_shared_out():
    observer = Observer()
    team = ObservedTeam(observer, 2)
    numbers = np.ones(64, np.float32)

    def part(first, last):
        add_into(numbers[first:last], numbers[first:last])
        sum_of_squares(numbers[first:last])

    with observer.watch():
        team.run(part, numbers.size)
        sum_of_squares(numbers)
    team.close()
    assert {name: tally.calls for name, tally in observer.kernels.items()} == {"add_into": 1, "sum_of_squares": 2}
    assert observer.kernels["add_into"].work.num_bytes == 3 * numbers.nbytes
    assert observer.kernels["sum_of_squares"].work.num_bytes == 2 * numbers.nbytes
    assert numbers[0] == 2


def test_nothing_is_counted_when_nobody_watches():
    observer = Observer()
    team = ObservedTeam(observer, 1)
    numbers = np.ones(64, np.float32)
    with pytest.raises(ValueError, match="an error of the caller"), observer.watch():
        raise ValueError("an error of the caller")
    add_into(numbers, numbers)
    team.run(lambda first, last: add_into(numbers, numbers), 1)
    assert observer.kernels == {} and numbers[0] == 4
    assert "__call__" not in vars(type(add_into))
