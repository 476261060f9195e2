"""A restart on several ranks after each kind of damage: the newest sound state is taken, bit for bit."""

import os
import random
import shutil
from types import SimpleNamespace

import pytest
from support.checkpointing import Told, save, shared_folder
from support.damage import KINDS, VIEW
from support.small_training import Training

from hpcpipe.checkpoint.layout import candidates
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.directory import RunDirectory
from hpcpipe.train.resume import find_start, resume_state

pytestmark = pytest.mark.mpi(min_size=2)

_ATTEMPTS = 50


def arrays_of(state):
    """Name all that a checkpoint gives a rank."""
    for index, stage in state.stages.items():
        for name, array in stage.parameters.weights.arrays.items():
            yield f"{index} weight {name}", array
        for moment, arena in stage.moments.items():
            for name, array in arena.arrays.items():
                yield f"{index} {moment} {name}", array


def bits_of(state):
    return {name: array.tobytes() for name, array in arrays_of(state)}


def break_newest(comm, root, kind, seed):
    """Damage the newest checkpoint on rank 0; tell every rank which file."""
    name = None
    if comm.rank == 0:
        draw, newest = random.Random(f"{kind}/{seed}"), candidates(root)[0]
        name = next(filter(None, (KINDS[kind](newest, draw) for _ in range(_ATTEMPTS)))).name
    return comm.bcast(name)


def test_each_kind_of_damage_costs_one_checkpoint_and_no_bit(comm, tmp_path):
    data = 2 if comm.size % 2 == 0 else 1
    training = Training(comm, comm.size // data, data, microbatches=2 * data, layers=2 * comm.size + 1, width=24)
    state, folder = training.state, shared_folder(comm, tmp_path)
    expected = {}
    (folder / "sound").mkdir(exist_ok=True)
    for step in (1, 2):
        training.run(1)
        save(state, training.grid, folder / "sound")
        expected[step] = bits_of(state)
    # Eight ranks have a few cores between them, and do nothing else than four.
    for number, kind in enumerate(list(KINDS)[:: 3 if comm.size > 4 else 1]):
        directory = RunDirectory(folder / str(number))
        if comm.rank == 0:
            shutil.copytree(folder / "sound", directory.path)
        comm.Barrier()
        damaged = break_newest(comm, directory.checkpoints, kind, comm.bcast(os.environ.get("HPCPIPE_TEST_SEED", "")))
        for _, array in arrays_of(state):
            array.fill(float("nan"))
        told = Told()
        session = SimpleNamespace(
            config=state.config,
            grid=training.grid,
            waiter=Waiter(60.0),
            directory=directory,
            metrics=None,
            console=told,
            events=told,
        )
        tokens = SimpleNamespace(digest="", tokenizer="bytes")
        resume_state(session, state, find_start(session, "auto"), tokens, "auto")
        # A start does not need the view.
        step = 2 if damaged == VIEW else 1
        assert state.step == step, (kind, damaged, told.lines)
        assert bits_of(state) == expected[step], (kind, damaged)
        events = [event["event"] for event in told.events]
        assert events == ["checkpoint refused"] * (step == 1) + ["resumed"], (kind, damaged, told.events)
    training.close()
