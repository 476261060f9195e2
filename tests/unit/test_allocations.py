"""Nothing is allocated where a step computes: neither by kernels nor, for arrays, around them.

Counted are blocks of array data that numpy allocates, whatever their size and however short their lives, and blocks of
numba's runtime beyond the one that it needs for each array argument of a call. Views, numbers and other Python objects
are not counted. `tests/mpi/test_allocations.py` counts whole steps.
"""

import numpy as np
import pytest
from support.allocations import counted_allocations

from hpcpipe.data.prepare import prepare
from hpcpipe.data.reader import TokenFile
from hpcpipe.data.windows import Samples
from hpcpipe.kernels.cases import cases
from hpcpipe.kernels.heap import allocated_blocks
from hpcpipe.kernels.jit import kernel
from hpcpipe.train.batches import TrainingBatches


def test_the_counter_of_numpy_counts():
    array = np.zeros(4)
    with counted_allocations() as found:
        view = array[1:]
        assert found == []
        total = view + view
        np.zeros(100)
    assert [allocation.num_bytes for allocation in found] == [24, 800]
    assert "view + view" in found[0].where
    np.zeros(7)
    assert len(found) == 2 and total.sum() == 0.0


@kernel
def allocating(x):
    x[0] += np.zeros(x.shape[0] + 1).sum()


def blocks_beyond_arguments(function, arguments):
    before = allocated_blocks()
    function(*arguments)
    return allocated_blocks() - before - sum(isinstance(argument, np.ndarray) for argument in arguments)


def test_the_counter_of_kernels_counts():
    allocating(np.zeros(3))
    assert blocks_beyond_arguments(allocating, (np.zeros(3),)) == 1


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_no_kernel_allocates(precision):
    every = cases(precision)
    assert len(every) > 15
    for function, arguments in every:
        function(*arguments)
        assert blocks_beyond_arguments(function, arguments) == 0, function.__name__


def test_reading_samples_allocates_nothing(tmp_path):
    (tmp_path / "text.txt").write_text("some words and more " * 500)
    prepare([str(tmp_path)], tmp_path / "tokens.h5")
    with TokenFile(tmp_path / "tokens.h5") as file:
        training, _ = file.split(0.0)
        batches = TrainingBatches(Samples(training, 16, 3), 4, range(1, 3), 2, 16)
        batches.load(1)
        with counted_allocations() as found:
            for step in range(2, 200):
                batches.load(step)
    assert found == []
