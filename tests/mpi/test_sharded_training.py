"""The optimizer's state is sharded over replicas: a share of the memory, the same bits, checkpoints for any grid."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI
from support import small_training
from support.checkpointing import save, shared_folder
from support.small_training import all_weights

from hpcpipe.checkpoint.layout import candidates
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.verify import verify
from hpcpipe.errors import NumericsError
from hpcpipe.kernels.reduce import BLOCK
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.grid import make_grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.load import load_state
from hpcpipe.train.state import build_state

pytestmark = pytest.mark.mpi(min_size=2)

HARD = MessageMode(synchronous=True, max_delay_s=0.002)
WIDE = {"width": 48, "layers": 7, "microbatches": 8}


def train(comm, pipeline, data, **choices):
    # Wide enough that shards end inside of tensors.
    return small_training.train(comm, pipeline, data, 2, **{**WIDE, **choices})


@functools.cache
def train_alone(**choices):
    return train(MPI.COMM_SELF, 1, 1, **choices)


def moments_of(state):
    """Return the bytes of this rank's parts of the moments that checkpoints hold, by name, kind and first element."""
    return {
        (held.name, moment, held.start): arena.arrays[held.name].tobytes()
        for stage in state.stages.values()
        for held in stage.owned_slices(stage.shard)
        for moment, arena in stage.moments.items()
    }


def assert_same(comm, pipeline, data, **choices):
    everywhere = {key: choices[key] for key in ("tied", "lanes") if key in choices}
    expected, alone = train_alone(**everywhere)
    found, state = train(comm, pipeline, data, **choices)
    assert found == expected, (pipeline, data, choices)
    weights = dict(all_weights(alone))
    held = all_weights(state)
    assert held and all(weights[name] == content for name, content in held), (pipeline, data, choices)
    (stage,) = alone.stages.values()
    for (name, moment, first), content in moments_of(state).items():
        whole = stage.moments[moment].arrays[name].tobytes()
        assert whole[4 * first : 4 * first + len(content)] == content, (name, moment, first)


def grids(size):
    return [(size // data, data) for data in (2, 4, 8) if size % data == 0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weights_and_moments_have_the_bits_of_one_process(comm, tied, recompute):
    for pipeline, data in grids(comm.size):
        assert_same(comm, pipeline, data, tied=tied, recompute=recompute, lanes=8)


@pytest.mark.parametrize("schedule", ["looped-bfs", "interleaved", "zb-v", "v-min"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_several_stages_per_rank(comm, schedule, tied):
    for pipeline, data in grids(comm.size):
        if pipeline <= 2:
            assert_same(comm, pipeline, data, schedule=schedule, tied=tied, lanes=8)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_synchronous_sends_and_delays(comm, schedule, monkeypatch):
    monkeypatch.setattr("hpcpipe.mpi.shards._SMALLEST_MESSAGE", 3000)
    monkeypatch.setattr("hpcpipe.mpi.shards._LARGEST_MESSAGE", 3000)
    for pipeline, data in grids(comm.size):
        if pipeline <= 2:
            assert_same(comm, pipeline, data, schedule=schedule, lanes=8, mode=HARD)


def test_many_buckets(comm, monkeypatch):
    monkeypatch.setattr("hpcpipe.optim.shards.LARGEST_BUCKET", 5000)
    for pipeline, data in grids(comm.size):
        assert_same(comm, pipeline, data, lanes=8)


def test_three_replicas_agree_among_pipelines(comm):
    if comm.size != 3:
        pytest.skip("needs 3 ranks")
    # Two stages on the one rank of each replica, in a V.
    choices = {"microbatches": 6}
    expected, one = train(comm, 1, 3, **choices)
    found, two = train(comm, 1, 3, schedule="zb-v", **choices)
    assert found == expected
    assert dict(all_weights(one)) == dict(all_weights(two))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_optimizer_memory_falls_as_one_over_the_replicas(comm, tied):
    whole = sum(arena.flat.size for arena in train_alone(tied=tied)[1].stages[0].moments.values())
    _, state = train(comm, 1, comm.size, tied=tied, microbatches=comm.size)
    (stage,) = state.stages.values()
    held = sum(arena.flat.size for arena in stage.moments.values())
    slack = 2 * len(stage.buckets) * (BLOCK + 16 * len(stage.moments["moment1"].arrays))
    assert abs(held - whole / comm.size) <= slack
    assert comm.allreduce(held) >= whole


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_checkpoint_is_shared_out_and_loads_on_any_grid(comm, tied, tmp_path_factory):
    waiter = Waiter(60.0)
    data = 3 if comm.size == 3 else 2
    _, state = train(comm, comm.size // data, data, tied=tied, microbatches=6 if data == 3 else 8)
    grid = make_grid(comm, comm.size // data, data)
    path = save(state, grid, shared_folder(comm, tmp_path_factory.mktemp("run")))
    manifest = load_manifest(path)
    with together(comm, waiter):
        assert verify(path) == []
    assert sorted(manifest.files) == [f"rank-{rank:04d}.h5" for rank in range(comm.size)]
    sizes = [entry.size_bytes for entry in manifest.files.values()]
    assert max(sizes) < 2.5 * sum(sizes) / len(sizes)

    # What was written is what is read, on one process and on another grid.
    alone = build_state(small_config(state.config, 1), (0,), 0)
    load_state(alone, path, manifest)
    whole = moments_of(alone)
    for (name, moment, first), content in moments_of(state).items():
        assert whole[name, moment, 0][4 * first : 4 * first + len(content)] == content
    weights = dict(all_weights(alone))
    assert all(weights[name] == content for name, content in all_weights(state))
    other = build_state(small_config(state.config, comm.size), (0,), 0, comm.rank)
    load_state(other, path, manifest)
    assert other.step == state.step
    for (name, moment, first), content in moments_of(other).items():
        assert whole[name, moment, 0][4 * first : 4 * first + len(content)] == content
    grid.free()


def small_config(config, data):
    """Return a configuration for one stage and a number of replicas."""
    return replace(config, parallel=replace(config.parallel, pipeline=1, data=data, partition="auto"))


def test_a_moment_that_is_not_finite_on_one_replica_is_refused_by_all(comm, tmp_path):
    _, state = train(comm, 1, comm.size, microbatches=comm.size)
    grid = make_grid(comm, 1, comm.size)
    if comm.rank == comm.size - 1:
        next(iter(state.stages[0].moments["moment2"].arrays.values()))[0] = np.inf
    folder = shared_folder(comm, tmp_path)
    with pytest.raises(NumericsError, match=r"step 2: moment2 of .* has a value that is not finite: no checkpoint"):
        save(state, grid, folder)
    assert candidates(folder / "checkpoints") == []
    grid.free()
