"""The process that writes a rank's checkpoints: what it is told, what it answers, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpcpipe.checkpoint.layout import PieceSpec, partial_name
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.process import WriterProcess
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.snapshot import Snapshot, snapshot_bytes
from hpcpipe.checkpoint.verify import verify
from hpcpipe.errors import DiskError, ExitCode
from hpcpipe.memory.shared import SharedBlock

HEADER = {"step": 3, "model": {"layers": 2}, "val_loss": None}
LIMIT_S = 30.0


class Rank:
    """A rank's side: two tensors and its writer."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.arrays = [np.arange(12, dtype=np.float32), np.ones(5, np.float32)]
        self.specs = [
            PieceSpec("a/weight", "weight", (3, 4), 0, 12, "float32"),
            PieceSpec("b/weight", "weight", (5,), 0, 5, "float32"),
        ]
        sizes = [spec.num_bytes for spec in self.specs]
        block = SharedBlock("snapshot")
        memory = block.allocate(snapshot_bytes(sizes))
        self.snapshot = Snapshot(memory, sizes)
        self.process = WriterProcess(block.handle)
        self.process.prepare(
            {"do": "prepare", "rank": 0, "bytes": memory.nbytes, "pieces": [spec.to_json() for spec in self.specs]}
        )
        self.answers: list[dict] = []

    def ask(self, **order):
        """Return the answer to an order."""
        self.process.send(order)
        return self.hear(order["do"])

    def hear(self, do):
        """Wait for the answer to an order, or for the end of the process."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            self.answers += self.process.poll()
            for answer in self.answers:
                if answer.get("do") == do or "died" in answer:
                    self.answers.remove(answer)
                    return answer
            time.sleep(0.001)
        raise AssertionError(f"no answer to {do} within {LIMIT_S} s")

    def write(self, step=3):
        self.snapshot.take(self.arrays)
        return self.ask(do="write", step=step, partial=str(self.partial(step)))

    def partial(self, step=3):
        return self.root / partial_name(step, "abc")


@pytest.fixture
def rank(tmp_path):
    rank = Rank(tmp_path / "checkpoints")
    yield rank
    rank.process.close()


def test_a_checkpoint_is_written_committed_read_back_and_kept(rank, tmp_path):
    record = rank.write()["record"]
    rank.arrays[0][:] = -1
    rank.snapshot.take(rank.arrays)
    lock = tmp_path / "lock.json"
    lock.write_text('{"fence": "ours"}')
    order = {"do": "commit", "partial": str(rank.partial()), "header": HEADER, "records": [record]}
    committed = rank.ask(**order, lock={"path": str(lock), "fence": "ours"})
    path = Path(committed["path"])
    assert path == rank.root / "step-00000003"
    assert rank.ask(do="verify", path=str(path)) == {"do": "verify"}
    kept = rank.ask(do="retain", root=str(rank.root), newest=str(path), keep=1, keep_every=0, keep_best=True)
    assert kept == {"do": "retain", "removed": []}
    assert verify(path) == []
    out = np.empty((3, 4), np.float32)
    Reader(path, load_manifest(path)).read("a/weight", "weight", out)
    np.testing.assert_array_equal(out.ravel(), np.arange(12))


def test_what_the_disk_has_changed_is_noticed(rank):
    record = rank.write()["record"]
    path = Path(rank.ask(do="commit", partial=str(rank.partial()), header=HEADER, records=[record])["path"])
    file = path / "rank-0000.h5"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    answer = rank.ask(do="verify", path=str(path))
    assert answer["failed"] == ExitCode.DAMAGED
    assert "was altered after it was written" in answer["problem"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_committed(rank, value):
    rank.arrays[1][3] = value
    answer = rank.write()
    assert answer["failed"] == ExitCode.NUMERICS
    assert "weight of b/weight has a value that is not finite" in answer["problem"]
    assert rank.ask(do="abandon", partial=str(rank.partial())) == {"do": "abandon"}
    assert not list(rank.root.iterdir())


def test_a_refusal_of_the_disk_is_an_answer(rank):
    rank.root.write_text("in the way")
    answer = rank.write()
    assert answer["failed"] == ExitCode.DISK
    assert str(rank.root) in answer["problem"]
    rank.root.unlink()
    assert "record" in rank.write()


def test_who_has_lost_the_lock_commits_nothing(rank, tmp_path):
    record = rank.write()["record"]
    lock = tmp_path / "lock.json"
    lock.write_text('{"fence": "theirs"}')
    order = {"do": "commit", "partial": str(rank.partial()), "header": HEADER, "records": [record]}
    answer = rank.ask(**order, lock={"path": str(lock), "fence": "ours"})
    assert answer["failed"] == ExitCode.IN_USE
    assert "another run has taken this run directory over" in answer["problem"]
    assert [path.name for path in rank.root.iterdir()] == [rank.partial().name]


def test_a_lock_that_somebody_removed_is_waited_for(rank, tmp_path):
    record = rank.write()["record"]
    lock = tmp_path / "lock.json"
    order = {"do": "commit", "partial": str(rank.partial()), "header": HEADER, "records": [record]}
    rank.process.send({**order, "lock": {"path": str(lock), "fence": "ours"}})
    time.sleep(0.5)
    assert rank.process.poll() == []
    lock.write_text('{"fence": "ours"}')
    assert "path" in rank.hear("commit")


def test_a_suspended_writer_is_not_waited_for_for_ever(rank):
    os.kill(rank.process.pid, signal.SIGSTOP)
    rank.process.send({"do": "clean", "root": str(rank.root), "token": "abc"})
    with pytest.raises(DiskError, match=f"this rank's checkpoints, {rank.process.pid}, has not answered for 0.2 s"):
        rank.process.wait(bool, 0.2)
    rank.process.close()


def test_leftovers_go_but_not_those_of_this_launch(rank):
    for name in ("step-00000001.partial", "step-00000002.0123.partial", "trash-x"):
        (rank.root / name).mkdir(parents=True)
    (rank.root / partial_name(3, "abc1")).mkdir()
    (rank.root / "notes").mkdir()
    assert rank.ask(do="clean", root=str(rank.root), token="abc") == {"do": "clean"}
    assert sorted(path.name for path in rank.root.iterdir()) == ["notes", "step-00000003.abc1.partial"]


def test_a_killed_writer_is_told_once_and_replaced(rank):
    os.kill(rank.process.pid, signal.SIGKILL)
    first = rank.hear("anything")
    assert first == {"died": "the process that writes this rank's checkpoints was ended by signal 9"}
    assert rank.process.poll() == []
    assert "record" in rank.write()


def test_an_order_to_a_writer_that_has_just_died_is_answered(rank):
    rank.write()
    os.kill(rank.process.pid, signal.SIGKILL)
    assert "died" in rank.write(4)
    assert "record" in rank.write(5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_for_the_rank_do_not_end_its_writer(rank, number):
    rank.write()
    os.kill(rank.process.pid, number)
    assert "record" in rank.write(4)


def test_the_writer_has_the_lowest_priority(rank):
    rank.write()
    assert os.getpriority(os.PRIO_PROCESS, rank.process.pid) == 19


def test_closing_ends_the_process(rank):
    pid = rank.process.pid
    rank.process.close()
    assert not Path(f"/proc/{pid}").exists()
    rank.process.close()


PARENT = """
import os, sys, time
from hpcpipe.checkpoint.process import WriterProcess
from hpcpipe.memory.shared import SharedBlock
process = WriterProcess(SharedBlock("snapshot").handle)
process.send({"do": "clean", "root": "nowhere", "token": "x"})
while not process.poll():
    time.sleep(0.01)
print(process.pid, flush=True)
time.sleep(60)
"""


def test_the_writer_ends_with_a_rank_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_running(pid)


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_large_order_does_not_block_the_rank(rank):
    rank.write()
    os.kill(rank.process.pid, signal.SIGSTOP)
    try:
        start = time.perf_counter()
        rank.process.send({"do": "clean", "root": "x" * 4_000_000, "token": ""})
        assert rank.process.poll() == []
        assert time.perf_counter() - start < 1.0
    finally:
        os.kill(rank.process.pid, signal.SIGCONT)
    assert rank.hear("clean")["do"] == "clean"
