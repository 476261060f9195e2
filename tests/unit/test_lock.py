"""The lock of a run directory: one holder, taken over only when the holder is gone."""

import json
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from hpcpipe.cluster import holder as holder_module
from hpcpipe.cluster.environment import LAUNCH_ID
from hpcpipe.cluster.holder import Holder, fence_of, is_known_alive, process_start, this_process
from hpcpipe.errors import DiskError, InUseError
from hpcpipe.train import lock as lock_module
from hpcpipe.train.lock import RunLock, is_held_by_another

ELSEWHERE = Holder("elsewhere", "another boot", "pid:[1]", 1, "0", started="then", fence="a fence")


def hold(path, holder=None, **changes):
    """Write the lock of another process: by default of a dead one of this machine."""
    holder = holder or replace(this_process(), pid=1, process_start="0", started="then")
    path.write_text(json.dumps({**asdict(holder), **changes}))


def on_another_host(number, **changes):
    return replace(this_process(), host=f"n{number}", boot_id=f"boot {number}", **changes)


@pytest.fixture
def watch_briefly(monkeypatch):
    monkeypatch.setattr(lock_module, "_WATCH_S", 0.3)
    monkeypatch.setattr(lock_module, "_POLL_S", 0.01)


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Put a stand-in for squeue first on PATH; the function it returns sets its answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answer(script):
        (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "squeue").chmod(stat.S_IRWXU)

    return answer


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
    other = RunLock(path, on_another_host(1))
    other.acquire()
    began = time.monotonic()
    with pytest.raises(InUseError, match=f"process {os.getpid()} on n1"):
        RunLock(path, on_another_host(2)).acquire()
    assert time.monotonic() - began < 2.5
    other.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("age_s", [0, 3600, -3600])
def test_a_lock_that_nobody_renews_is_taken_over_whatever_the_clocks_say(tmp_path, age_s, watch_briefly):
    path = tmp_path / "lock.json"
    hold(path, ELSEWHERE)
    os.utime(path, (0, time.time() - age_s))
    said = []
    lock = RunLock(path, say=said.append)
    assert lock.acquire() == "process 1 on elsewhere"
    assert "watching" in said[0] and "process 1 on elsewhere" in said[0]
    lock.release()


def test_watching_takes_three_seconds(tmp_path):
    hold(tmp_path / "lock.json", ELSEWHERE)
    began = time.monotonic()
    lock = RunLock(tmp_path / "lock.json")
    lock.acquire()
    assert 2.9 < time.monotonic() - began < 4
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"pid": "x"}', "\xff", "[" * 100_000])
def test_a_broken_lock_belongs_to_nobody(tmp_path, content):
    (tmp_path / "lock.json").write_text(content, encoding="latin-1")
    RunLock(tmp_path / "lock.json").acquire()


@pytest.mark.parametrize("change", [{"pid": "1\0"}, {"pid": [1]}, {"host": 7}, {"process_start": None}, {"pid": True}])
def test_a_lock_whose_values_have_a_wrong_type_belongs_to_nobody(tmp_path, change):
    hold(tmp_path / "lock.json", **change)
    assert not is_held_by_another(tmp_path / "lock.json")
    assert fence_of(tmp_path / "lock.json") == ""
    RunLock(tmp_path / "lock.json").acquire()


def test_release_leaves_a_lock_that_somebody_else_took(tmp_path):
    lock = RunLock(tmp_path / "lock.json")
    lock.acquire()
    hold(tmp_path / "lock.json", pid=99)
    lock.release()
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == 99
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


def test_a_zombie_holds_nothing(tmp_path):
    path = tmp_path / "lock.json"
    with subprocess.Popen(["sleep", "30"]) as child:
        hold(path, pid=child.pid, process_start=process_start(child.pid))
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
    hold(path, pid=os.getppid(), process_start=process_start(os.getppid()))
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


def test_rank_0_takes_the_lock_from_its_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "_RENEW_S", 0.05)
    monkeypatch.setattr(lock_module, "_PATIENCE_S", 0.1)
    path = tmp_path / "lock.json"
    of_launch, of_another = {LAUNCH_ID: "abc"}, {LAUNCH_ID: "xyz"}
    launcher = RunLock(path, this_process(of_launch))
    assert launcher.acquire() == ""
    with pytest.raises(InUseError):
        RunLock(path, this_process(of_another)).acquire()
    rank = RunLock(path, replace(this_process(of_launch), host="n2", boot_id="another"))
    assert rank.acquire() == ""
    time.sleep(0.2)
    launcher.release()
    assert fence_of(path) == rank.fence
    assert rank.is_ours()
    monkeypatch.setenv(LAUNCH_ID, "abc")
    assert not is_held_by_another(path)
    rank.release()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path):
    path = tmp_path / "lock.json"
    first, second = RunLock(path), RunLock(path)
    first.acquire()
    threading.Timer(0.3, first.release).start()
    second.acquire()
    assert fence_of(path) == second.fence
    second.release()


def test_what_is_known_of_a_holder_at_once(monkeypatch):
    me = replace(this_process(), cluster="c", job=7, restart_count=2)
    now, before_boot = time.time(), holder_module._boot_time() - 60
    assert before_boot > 0
    assert is_known_alive(me, me, now) is True
    assert is_known_alive(replace(me, process_start="1"), me, now) is False
    assert is_known_alive(replace(me, host="renamed"), me, now) is True
    # The same number in another container says nothing.
    assert is_known_alive(replace(me, pid_namespace="pid:[1]", cluster=""), me, now) is None
    assert is_known_alive(replace(me, boot_id="before", cluster=""), me, before_boot) is False
    # Another machine of the same name, as containers have.
    assert is_known_alive(replace(me, boot_id="before", cluster=""), me, now) is None
    away = replace(me, host="n2", boot_id="another")
    assert is_known_alive(away, me, now) is None
    assert is_known_alive(replace(away, restart_count=1), me, now) is False
    assert is_known_alive(replace(away, restart_count=1, cluster="another"), me, now) is None
    assert is_known_alive(replace(away, restart_count=3), me, now) is None
    assert is_known_alive(Holder(), me, now) is False


@pytest.mark.parametrize(
    ("script", "known"),
    [
        ("echo RUNNING", None),
        ("echo COMPLETING", None),
        ("echo SUSPENDED", None),
        ("echo COMPLETED", False),
        ("echo NODE_FAIL", False),
        ("echo PENDING", False),
        ("", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None),
        ("exec sleep 30", None),
    ],
)
def test_slurm_is_asked_whether_another_job_has_ended(squeue, script, known):
    squeue(script)
    me = replace(this_process(), cluster="c", job=7)
    began = time.monotonic()
    assert is_known_alive(replace(me, host="n2", boot_id="another", job=6), me, time.time()) is known
    assert time.monotonic() - began < 3


def test_slurm_is_asked_about_the_job_and_only_on_its_cluster(squeue, tmp_path):
    squeue(f'echo "$@" >> {tmp_path}/asked')
    me = replace(this_process(), cluster="c", job=7)
    for cluster in ("c", "another", ""):
        is_known_alive(replace(me, host="n2", boot_id="another", job=6, cluster=cluster), me, time.time())
    assert (tmp_path / "asked").read_text() == "-h -j 6 -t all -o %T\n"


def test_the_lock_names_the_job():
    environ = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3", "SLURM_CLUSTER_NAME": "c"}
    holder = this_process(environ)
    assert (holder.cluster, holder.job, holder.restart_count) == ("c", 12, 3)
    assert str(holder).endswith("(Slurm job 12)")
    assert Holder.from_bytes(holder.to_bytes()) == holder
    assert this_process().fence != this_process().fence


def test_the_fence_of_a_lock(tmp_path):
    path = tmp_path / "lock.json"
    assert fence_of(path) == fence_of(tmp_path / "missing" / "lock.json") == ""
    lock = RunLock(path)
    lock.acquire()
    assert fence_of(path) == lock.fence != ""
    lock.release()
    assert fence_of(path) == ""


def test_a_holder_whose_lock_was_taken_over_must_not_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "_RENEW_S", 0.05)
    path = tmp_path / "lock.json"
    lock = RunLock(path)
    lock.acquire()
    lock.check()
    assert lock.is_ours()
    hold(path, ELSEWHERE)
    deadline = time.monotonic() + 5
    with pytest.raises(InUseError, match="was taken over by process 1 on elsewhere"):
        while time.monotonic() < deadline:
            lock.check()
            time.sleep(0.01)
    assert not lock.is_ours()
    path.unlink()
    assert not lock.is_ours()
    assert not path.exists()


def test_a_holder_that_was_suspended_looks_before_it_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    lock = RunLock(path)
    lock.acquire()
    lock._done.set()
    lock._done = threading.Event()  # nobody renews
    hold(path, ELSEWHERE)
    lock.check()
    later = time.monotonic() + 10
    monkeypatch.setattr(lock_module.time, "monotonic", lambda: later)
    with pytest.raises(InUseError):
        lock.check()


def test_a_lock_that_somebody_removed_is_made_again(tmp_path):
    path = tmp_path / "lock.json"
    lock = RunLock(path)
    lock.acquire()
    path.unlink()
    assert lock.is_ours()
    assert fence_of(path) == lock.fence
    lock.release()
    assert not lock.is_ours()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(lock_module.os, "link", refuse)
    path = tmp_path / "lock.json"
    lock = RunLock(path)
    lock.acquire()
    with pytest.raises(InUseError):
        RunLock(path).acquire()
    lock.release()
    hold(path)
    lock = RunLock(path)
    assert lock.acquire() == f"process 1 on {socket.gethostname()}"
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_link_whose_answer_was_lost_counts(tmp_path, monkeypatch):
    link = os.link

    def link_and_forget(source, target):
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(lock_module.os, "link", link_and_forget)
    lock = RunLock(tmp_path / "lock.json")
    assert lock.acquire() == ""
    assert fence_of(tmp_path / "lock.json") == lock.fence
    lock.release()


def test_a_run_waits_while_another_takes_over_a_dead_lock(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    hold(path)
    temporary, looking, go_on, refused = lock_module._temporary, threading.Event(), threading.Event(), []

    def hesitate(where, me):
        if where == path and me.host == "n1":
            looking.set()
            go_on.wait(10)
        return temporary(where, me)

    def second():
        try:
            RunLock(path, replace(this_process(), started="second")).acquire()
        except InUseError as error:
            refused.append(error)

    monkeypatch.setattr(lock_module, "_temporary", hesitate)
    lock = RunLock(path, replace(this_process(), host="n1"))
    threads = [threading.Thread(target=lock.acquire), threading.Thread(target=second)]
    threads[0].start()
    assert looking.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and json.loads(path.read_text())["pid"] == 1
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    assert fence_of(path) == lock.fence
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_slow_run_does_not_replace_the_lock_of_a_faster_one(tmp_path):
    path = tmp_path / "lock.json"
    hold(path)
    dead = path.read_bytes()
    fast, slow = RunLock(path), this_process()
    fast.acquire()
    assert not lock_module._replace(path, dead, slow, slow.to_bytes())
    assert fence_of(path) == fast.fence
    fast.release()
    assert not lock_module._replace(path, dead, slow, slow.to_bytes())
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_died_while_it_took_over_is_taken_over_too(tmp_path):
    path = tmp_path / "lock.json"
    hold(path)
    right = path
    for _ in range(3):
        right = right.with_name(f"{right.name}.{lock_module._digest(right.read_bytes())}")
        hold(right, fence=os.urandom(4).hex())
    (tmp_path / ".lock.json.0.1.tmp").touch()
    lock = RunLock(path)
    lock.acquire()
    assert [found.name for found in tmp_path.iterdir()] == ["lock.json"]
    lock.release()


CONTENDER = """
import json, os, sys, time
from dataclasses import replace
from pathlib import Path
from hpcpipe.cluster.holder import this_process
from hpcpipe.errors import InUseError
from hpcpipe.train.lock import RunLock
number, path = int(sys.argv[1]), Path(sys.argv[2])
me = replace(this_process(), host=f"n{number}", boot_id=f"boot {number}", pid_namespace=f"pid:[{number}]")
print("ready", flush=True)
for _ in sys.stdin:
    began = time.monotonic()
    lock = RunLock(path, me=replace(me, fence=os.urandom(16).hex()))
    try:
        taken_from = lock.acquire()
    except InUseError:
        print(json.dumps(["refused", time.monotonic() - began]), flush=True)
        continue
    print(json.dumps(["held", time.monotonic() - began]), flush=True)
    sys.stdin.readline()
    lock.release() if number % 2 else lock._done.set()
    print("left", flush=True)
"""


def contend(path, num_contenders, num_rounds):
    """Let processes that pretend to be on hosts of their own take a lock at once, over and over; it is often dead."""
    command = [sys.executable, "-c", CONTENDER]
    contenders = [
        subprocess.Popen([*command, str(number), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(num_contenders)
    ]

    def tell(contender):
        contender.stdin.write("\n")
        contender.stdin.flush()

    def hear(contender):
        return contender.stdout.readline().strip()

    try:
        assert {hear(contender) for contender in contenders} == {"ready"}
        for _ in range(num_rounds):
            for contender in contenders:
                tell(contender)
            answers = [json.loads(hear(contender)) for contender in contenders]
            held = [contender for contender, answer in zip(contenders, answers, strict=True) if answer[0] == "held"]
            assert len(held) == 1, answers
            assert max(elapsed_s for kind, elapsed_s in answers if kind == "refused") < 4.5
            tell(held[0])
            assert hear(held[0]) == "left"
    finally:
        for contender in contenders:
            contender.kill()
            contender.communicate()


def test_exactly_one_of_three_hosts_gets_a_dead_lock(tmp_path):
    hold(tmp_path / "lock.json", ELSEWHERE)
    contend(tmp_path / "lock.json", num_contenders=3, num_rounds=2)


@pytest.mark.slow
def test_exactly_one_of_three_hosts_gets_the_lock_thirty_times(tmp_path):
    hold(tmp_path / "lock.json", ELSEWHERE)
    contend(tmp_path / "lock.json", num_contenders=3, num_rounds=30)


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
