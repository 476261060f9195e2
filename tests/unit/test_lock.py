"""The lock of a run directory: one holder, taken over only when the holder is gone."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from hpcpipe.errors import DiskError, InUseError
from hpcpipe.train.lock import RunLock, _process_start, is_held_by_another


def hold(path, **changes):
    identity = {"host": socket.gethostname(), "pid": 1, "process_start": "0", "started": "then", **changes}
    path.write_text(json.dumps(identity))


def test_a_second_run_is_refused_and_named(tmp_path):
    lock = RunLock(tmp_path / "lock.json")
    assert lock.acquire() == ""
    with pytest.raises(InUseError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        RunLock(tmp_path / "lock.json").acquire()
    lock.release()
    second = RunLock(tmp_path / "lock.json")
    assert second.acquire() == ""
    second.release()
    assert not (tmp_path / "lock.json").exists()


def test_a_killed_runs_lock_is_taken_over(tmp_path):
    path = tmp_path / "lock.json"
    code = f"from pathlib import Path; from hpcpipe.train.lock import RunLock; RunLock(Path({str(path)!r})).acquire()"
    subprocess.run([sys.executable, "-c", code + "; import os; os.kill(os.getpid(), 9)"], check=False)
    assert path.exists()
    lock = RunLock(path)
    assert "process" in lock.acquire()
    lock.release()


def test_a_reused_process_number_does_not_keep_the_lock(tmp_path):
    hold(tmp_path / "lock.json", pid=os.getpid(), process_start="12345")
    assert RunLock(tmp_path / "lock.json").acquire() == f"process {os.getpid()} on {socket.gethostname()}"


def test_another_machines_lock_counts_while_it_is_renewed(tmp_path):
    path = tmp_path / "lock.json"
    hold(path, host="elsewhere")
    with pytest.raises(InUseError, match="on elsewhere"):
        RunLock(path).acquire()
    os.utime(path, (0, time.time() - 3600))
    assert RunLock(path).acquire() == "process 1 on elsewhere"


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"pid": "x"}'])
def test_a_broken_lock_belongs_to_nobody(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    RunLock(tmp_path / "lock.json").acquire()


def test_release_leaves_a_lock_that_somebody_else_took(tmp_path):
    lock = RunLock(tmp_path / "lock.json")
    lock.acquire()
    hold(tmp_path / "lock.json", pid=99)
    lock.release()
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == 99


def test_a_zombie_holds_nothing(tmp_path):
    path = tmp_path / "lock.json"
    with subprocess.Popen(["sleep", "30"]) as child:
        hold(path, pid=child.pid, process_start=_process_start(child.pid))
        assert is_held_by_another(path)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_held_by_another(path)
        lock = RunLock(path)
        assert lock.acquire() == f"process {child.pid} on {socket.gethostname()}"
        lock.release()


def test_whether_another_run_is_alive(tmp_path):
    path = tmp_path / "lock.json"
    assert not is_held_by_another(path)
    lock = RunLock(path)
    lock.acquire()
    assert not is_held_by_another(path)
    lock.release()
    hold(path, pid=os.getppid(), process_start=_process_start(os.getppid()))
    assert is_held_by_another(path)
    hold(path, pid=os.getppid(), process_start="0")
    assert not is_held_by_another(path)


def test_a_directory_that_does_not_take_files(tmp_path):
    with pytest.raises(DiskError, match=r"choose another run\.dir"):
        RunLock(tmp_path / "missing" / "lock.json").acquire()


def test_only_one_of_many_gets_a_dead_lock(tmp_path):
    path = tmp_path / "lock.json"
    hold(path, pid=0)
    code = (
        "import sys; from pathlib import Path; from hpcpipe.train.lock import RunLock\n"
        "from hpcpipe.errors import InUseError\n"
        f"lock = RunLock(Path({str(path)!r}))\n"
        "try:\n lock.acquire(); print('held'); sys.stdout.flush(); sys.stdin.read()\n"
        "except InUseError: print('refused')\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [run.stdout.readline().strip() for run in runs]
    for run in runs:
        run.communicate()
    assert sorted(answers) == ["held", "refused", "refused", "refused"]
