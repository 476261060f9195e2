"""The trainer on every grid that the ranks allow gives the bits of one process."""

import functools

import numpy as np
import pytest
from mpi4py import MPI
from support import small_training
from support.hard_messages import fewer_steps
from support.small_training import CountedSamples, owned_weights

from hpcpipe.config.check import resolve
from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig
from hpcpipe.errors import UsageError
from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.grid import make_grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.schedule.build import GENERATORS, generate
from hpcpipe.schedule.csv_file import write_csv
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.rows import Notes
from hpcpipe.train.session import build_schedule
from hpcpipe.train.state import build_state
from hpcpipe.train.step import Trainer

pytestmark = pytest.mark.mpi(min_size=2)

STEPS = fewer_steps(3)


def train(comm, pipeline, data, **choices):
    """Return the loss and norm of each step, and this rank's weights, after a few steps."""
    results, state = small_training.train(comm, pipeline, data, STEPS, **choices)
    return results, owned_weights(state)


@functools.cache
def train_alone(**choices):
    """Return what one process gets."""
    return train(MPI.COMM_SELF, 1, 1, **choices)


def grids(size):
    return [(size // data, data) for data in range(1, size + 1) if size % data == 0]


def assert_same(comm, pipeline, data, **choices):
    expected, all_weights = train_alone(
        **{key: value for key, value in choices.items() if key not in ("mode", "schedule", "chunks", "recompute")}
    )
    found, weights = train(comm, pipeline, data, **choices)
    assert found == expected, (pipeline, data)
    assert weights and all(all_weights[name] == content for name, content in weights.items()), (pipeline, data)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_same_bits_on_every_grid(comm, schedule, tied):
    for pipeline, data in grids(comm.size):
        # Bits agree between replicas that hold aligned blocks of a power of two lanes.
        lanes = 1 if data == 1 else 8
        if data & (data - 1) == 0:
            assert_same(comm, pipeline, data, schedule=schedule, tied=tied, microbatches=8, lanes=lanes)


OTHERS = [name for name in GENERATORS if name not in ("gpipe", "1f1b", "forward")]


@pytest.mark.parametrize("schedule", OTHERS)
def test_same_bits_for_every_schedule(comm, schedule):
    assert_same(comm, comm.size, 1, schedule=schedule, layers=17, microbatches=2 * comm.size, recompute="full")
    if comm.size % 2 == 0:
        assert_same(comm, comm.size // 2, 2, schedule=schedule, layers=17, microbatches=2 * comm.size, lanes=4)


def test_a_schedule_from_a_file_gives_the_same_bits(comm, tmp_path_factory):
    path = tmp_path_factory.mktemp(f"rank{comm.rank}") / "mine.csv"
    path.write_text(write_csv(generate("zb-v", comm.size, 3)))
    assert_same(comm, comm.size, 1, schedule=str(path), layers=17, microbatches=3)
    with pytest.raises(UsageError, match=r"mine.csv is for parallel.microbatches .* = 3, and here it is 4"):
        train(comm, comm.size, 1, schedule=str(path), layers=17, microbatches=4)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 5])
def test_same_bits_for_few_and_odd_microbatches(comm, microbatches):
    assert_same(comm, comm.size, 1, microbatches=microbatches, lanes=1)


def test_same_bits_with_synchronous_sends_and_delays(comm):
    mode = MessageMode(synchronous=True, max_delay_s=0.002)
    for schedule in ("gpipe", "1f1b"):
        assert_same(comm, comm.size, 1, microbatches=4, schedule=schedule, mode=mode)


def test_same_bits_when_activations_are_recomputed(comm):
    expected, _ = train_alone(microbatches=3)
    for recompute in ("selective", "full"):
        for schedule in ("1f1b", "zb-h1"):
            found, _ = train(comm, comm.size, 1, microbatches=3, recompute=recompute, schedule=schedule)
            assert found == expected


def test_same_bits_for_an_uneven_partition(comm):
    partition = (1,) * (comm.size - 1) + (9 - comm.size + 1,)
    expected, _ = train_alone(microbatches=2)
    found, _ = train(comm, comm.size, 1, microbatches=2, partition=partition)
    assert found == expected


def test_replicas_that_are_no_power_of_two_agree_among_pipelines(comm):
    if comm.size % 3:
        pytest.skip("needs a multiple of 3 ranks")
    losses = [loss for loss, _ in train(comm, comm.size // 3, 3, microbatches=6)[0]]
    alone = [loss for loss, _ in train_alone(microbatches=6)[0]]
    assert losses[0] == alone[0]
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_a_stop_on_one_rank_is_known_to_all(comm):
    config = resolve(
        Config(
            model=ModelConfig(layers=9, width=12, heads=3, context=6, vocab=11),
            parallel=ParallelConfig(pipeline=comm.size, microbatches=1, microbatch_size=1),
        ),
        comm.size,
    )
    grid = make_grid(comm, comm.size, 1)
    schedule = build_schedule(config)
    state = build_state(config, schedule.stage_to_rank, grid.stage_rank, grid.replica)
    state.fill_initial()
    batches = TrainingBatches(CountedSamples(), 1, range(1), 1, config.model.context)
    trainer = Trainer(state, schedule, grid, Waiter(60.0), batches, MessageMode())
    assert not trainer.run(1).heard.stop
    assert trainer.run(2, lambda: Notes(stop=comm.rank == comm.size - 1)).heard.stop
    grid.free()
