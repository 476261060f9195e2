"""Checkpoints while training, on every number of ranks: phases, skips and failures are the same on all of them."""

import os
import signal

import numpy as np
import pytest
from support.checkpointing import checkpoints_of, shared_folder
from support.small_training import Training

from hpcpipe.checkpoint.layout import candidates
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.verify import verify
from hpcpipe.errors import DiskError, InUseError, NumericsError
from hpcpipe.train.checkpoints import Answer
from hpcpipe.train.rows import Notes

pytestmark = pytest.mark.mpi(min_size=2)

STEPS_AT_MOST = 4000


class Run:
    """A tiny training with checkpoints."""

    def __init__(self, comm, folder):
        self.comm, self.folder = comm, shared_folder(comm, folder)
        self.training = Training(comm, comm.size, 1, microbatches=2, layers=2 * comm.size + 1, width=24)
        self.training.run(1)
        self.kept = {}

    @property
    def state(self):
        return self.training.state

    @property
    def root(self):
        return self.folder / "checkpoints"

    def checkpoints(self):
        return checkpoints_of(self.state, self.training.grid, self.folder)

    def step(self, checkpoints):
        """Run a step as the loop does."""
        step = self.state.step + 1
        notes = lambda: Notes(due=checkpoints.is_due_by_time, answer=checkpoints.answer)  # noqa: E731
        result = self.training.trainer.run(step, notes)
        checkpoints.after_step(result.step_s, result.heard.answers)

    def keep_weights(self):
        """Remember this rank's weights of the step."""
        self.kept = {
            tensor.name: stage.parameters.weights.arrays[tensor.name].copy()
            for stage in self.state.stages.values()
            for tensor in stage.owned()
        }

    def until_committed(self, checkpoints, step):
        """Run steps until the checkpoint of a step is committed; return how many."""
        for count in range(STEPS_AT_MOST):
            if checkpoints.step == step:
                return count
            self.step(checkpoints)
        raise AssertionError(f"the checkpoint of step {step} is not committed after {STEPS_AT_MOST} steps")

    def assert_holds_kept(self, path):
        """Compare a checkpoint with the weights that were remembered."""
        assert verify(path) == []
        with Reader(path, load_manifest(path)) as reader:
            for name, array in self.kept.items():
                out = np.empty_like(array)
                reader.read(name, "weight", out)
                np.testing.assert_array_equal(out, array)

    def newest(self):
        self.comm.Barrier()
        return candidates(self.root)[0]


@pytest.fixture
def run(comm, tmp_path):
    run = Run(comm, tmp_path)
    yield run
    run.training.close()


def test_training_goes_on_while_a_checkpoint_of_an_earlier_step_is_written(run):
    with run.checkpoints() as (checkpoints, told):
        step = run.state.step
        run.keep_weights()
        checkpoints.take({"val_loss": 1.5})
        assert run.until_committed(checkpoints, step) >= 2
        checkpoints.finish({}, save=False, read_back=True)
        path = run.newest()
        assert load_manifest(path).header["val_loss"] == 1.5
        run.assert_holds_kept(path)
        assert [event["event"] for event in told.events] == ["checkpoint"]
        assert 0 < checkpoints.blocked_s < told.events[0]["seconds"]


def test_one_that_is_due_meanwhile_is_skipped_on_all_ranks(run):
    with run.checkpoints() as (checkpoints, told):
        first = run.state.step
        checkpoints.take({})
        run.step(checkpoints)
        checkpoints.take({})
        assert [event["event"] for event in told.events] == ["checkpoint skipped"]
        assert "skipped: that of step" in told.lines[0]
        run.until_committed(checkpoints, first)
        checkpoints.finish({}, save=True, read_back=True)
        assert checkpoints.step == run.state.step > first
        assert [path.name for path in candidates(run.root)] == [f"step-{s:08d}" for s in (run.state.step, first)]


def test_a_writer_that_dies_on_one_rank_fails_the_checkpoint_on_all(run, comm):
    with run.checkpoints() as (checkpoints, told):
        if comm.rank == comm.size - 1:
            os.kill(checkpoints._process.pid, signal.SIGSTOP)
        checkpoints.take({})
        run.step(checkpoints)
        assert checkpoints.step == 0
        if comm.rank == comm.size - 1:
            os.kill(checkpoints._process.pid, signal.SIGKILL)
        for _ in range(STEPS_AT_MOST):
            if told.events:
                break
            run.step(checkpoints)
        (failed,) = told.events
        assert failed["event"] == "checkpoint failed"
        assert "was ended by signal 9" in failed["problem"]
        run.keep_weights()
        checkpoints.finish({}, save=True, read_back=True)
        run.assert_holds_kept(run.newest())
        comm.Barrier()
        assert [path.name for path in run.root.iterdir()] == [f"step-{run.state.step:08d}"]


def test_a_disk_that_refuses_one_rank_ends_the_run_on_all_in_the_end(run, comm):
    most = run.state.config.checkpoint.max_failures
    with run.checkpoints() as (checkpoints, told):
        order = checkpoints._process.send

        def send(message):
            # One rank's folder is somewhere else.
            order({**message, "partial": "/proc/nowhere"} if message["do"] == "write" else message)

        if comm.rank == 1:
            checkpoints._process.send = send
        with pytest.raises(DiskError, match=rf"{most} checkpoints in a row failed .*/proc/nowhere"):
            for _ in range(STEPS_AT_MOST):
                checkpoints.take({})
                run.step(checkpoints)
        assert [event["in_a_row"] for event in told.events if event["event"] == "checkpoint failed"] == [1, 2, 3]
        assert candidates(run.root) == []


def test_a_number_that_is_not_finite_on_one_rank_ends_the_run_on_all(run, comm):
    with run.checkpoints() as (checkpoints, _):
        if comm.rank == 0:
            next(iter(run.state.stages.values())).moments["moment1"].flat[0] = np.nan
        with pytest.raises(NumericsError, match=r"moment1 of .* has a value that is not finite"):
            checkpoints.finish({}, save=True, read_back=True)
        assert candidates(run.root) == []


def test_a_run_that_has_lost_its_lock_commits_nothing(run, comm):
    with run.checkpoints() as (checkpoints, _):
        if comm.rank == 0:
            (run.folder / "lock.json").write_text('{"fence": "another"}')
        comm.Barrier()
        with pytest.raises(InUseError, match="another run has taken this run directory over"):
            checkpoints.finish({}, save=True, read_back=True)
        assert candidates(run.root) == []


def test_a_file_that_cannot_be_read_back_withdraws_the_checkpoint(run, comm):
    with run.checkpoints() as (checkpoints, told):
        step = run.state.step
        checkpoints.take({})
        while checkpoints.step != step:
            # The writer of the last rank reads back only when this test lets it.
            if checkpoints.answer is Answer.DONE and comm.rank == comm.size - 1:
                os.kill(checkpoints._process.pid, signal.SIGSTOP)
            run.step(checkpoints)
        if comm.rank == comm.size - 1:
            file = run.root / f"step-{step:08d}" / f"rank-{comm.rank:04d}.h5"
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 8
            file.write_bytes(content)
            os.kill(checkpoints._process.pid, signal.SIGCONT)
        checkpoints.finish({}, save=False, read_back=True)
        assert [event["event"] for event in told.events] == ["checkpoint", "checkpoint failed"]
        assert "was altered after it was written" in told.events[1]["problem"]
        checkpoints.finish({}, save=True, read_back=True)
        assert [path.name for path in candidates(run.root)] == [f"step-{run.state.step:08d}"]
