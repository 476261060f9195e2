"""The lock of a run directory: one holder, taken over only when the holder is gone."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time

import pytest

from hpcpipe.errors import DiskError, InUseError
from hpcpipe.train import lock as lock_module
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


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"pid": "x"}', "\xff", "[" * 100_000])
def test_a_broken_lock_belongs_to_nobody(tmp_path, content):
    (tmp_path / "lock.json").write_text(content, encoding="latin-1")
    RunLock(tmp_path / "lock.json").acquire()


@pytest.mark.parametrize("change", [{"pid": "1\0"}, {"pid": [1]}, {"host": 7}, {"process_start": None}])
def test_a_lock_whose_values_have_a_wrong_type_belongs_to_nobody(tmp_path, change):
    hold(tmp_path / "lock.json", **change)
    assert not is_held_by_another(tmp_path / "lock.json")
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


def test_a_directory_in_place_of_the_lock(tmp_path):
    (tmp_path / "lock.json").mkdir()
    assert not is_held_by_another(tmp_path / "lock.json")
    with pytest.raises(DiskError, match=r"lock\.json.*Is a directory.*choose another run\.dir"):
        RunLock(tmp_path / "lock.json").acquire()


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "run").touch()
    assert not is_held_by_another(tmp_path / "run" / "lock.json")
    with pytest.raises(DiskError, match="Not a directory"):
        RunLock(tmp_path / "run" / "lock.json").acquire()


def test_a_name_that_is_too_long_is_not_asked_about_again(tmp_path):
    path = tmp_path / ("x" * 300) / "lock.json"
    assert is_held_by_another(path)
    with pytest.raises(DiskError, match="too long"):
        RunLock(path).acquire()


def test_a_full_disk_leaves_no_lock(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(DiskError, match="free space"):
            RunLock(tmp_path / "lock.json").acquire()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_run_waits_while_another_takes_over_a_dead_lock(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    hold(path)
    is_alive, looking, go_on = lock_module._is_alive, threading.Event(), threading.Event()
    refused = []

    def look_slowly(holder, path):
        if not looking.is_set():
            looking.set()
            go_on.wait(10)
        return is_alive(holder, path)

    def second():
        try:
            RunLock(path).acquire()
        except InUseError as error:
            refused.append(error)

    monkeypatch.setattr(lock_module, "_is_alive", look_slowly)
    lock = RunLock(path)
    threads = [threading.Thread(target=lock.acquire), threading.Thread(target=second)]
    threads[0].start()
    assert looking.wait(10)
    threads[1].start()
    threads[1].join(0.1)
    assert json.loads(path.read_text())["pid"] == 1
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_three_runs_want_without_locks_of_the_file_system(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    hold(path, pid=2)
    read = lock_module._read

    def read_while_a_third_run_starts(aside):
        hold(path, pid=3)
        return read(aside)

    monkeypatch.setattr(lock_module, "_read", read_while_a_third_run_starts)
    lock_module._remove_if_unchanged(path, {**json.loads(path.read_text()), "pid": 1})
    assert json.loads(path.read_text())["pid"] == 3
    assert list(tmp_path.iterdir()) == [path]


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
