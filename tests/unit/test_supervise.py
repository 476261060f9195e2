"""The loop beside mpirun, with small stand-ins for mpirun that misbehave."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcpipe.cluster import rank_processes, supervise
from hpcpipe.cluster.supervise import Outcome, Progress

Captured = pytest.CaptureFixture[str]


def run(program: str, progress: Progress = Progress.RUNNING) -> Outcome:
    return supervise.supervise([sys.executable, "-c", program], os.environ, lambda: progress)


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> object:
    before = {number: signal.getsignal(number) for number in (*supervise.STOP_SIGNALS, signal.SIGCHLD)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


def test_code_and_text_pass_unchanged(capfd: Captured) -> None:
    outcome = run("import sys; print('out'); sys.stderr.write('one\\ntwo'); sys.exit(7)")
    assert outcome == Outcome(7, (), False, False)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("out\n", "one\ntwo")


def test_ctrl_c_is_answered_on_a_terminal_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.openpty()
    program = (
        "import os, signal, time; signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "for _ in range(2): time.sleep(0.3); os.kill(os.getppid(), signal.SIGINT)"
    )
    with os.fdopen(reader, "rb", 0) as shown, os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run(program).was_asked_to_stop
        terminal.close()  # a reader would wait for more
        text = shown.read(1000).decode()
    assert text.count("hpcpipe: note: the run is asked to stop; a third Ctrl-C kills it at once") == 1


def test_a_launcher_that_hangs_after_the_run_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_FINAL_GRACE_S", 0.5)
    monkeypatch.setattr(supervise, "_HANG_CHECK_S", 0.1)
    began = time.monotonic()
    outcome = run("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(30)", Progress.FINAL)
    assert outcome.code == -9
    assert 0.5 < time.monotonic() - began < 5


def test_a_launcher_that_hangs_after_its_ranks_died_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_FINAL_GRACE_S", 0.5)
    monkeypatch.setattr(supervise, "_HANG_CHECK_S", 0.1)
    began = time.monotonic()
    assert run("import subprocess, time; subprocess.run(['sleep', '0.5']); time.sleep(30)").code == -9
    assert 1.0 < time.monotonic() - began < 6


def test_a_launcher_that_hangs_after_it_told_of_a_failure_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_FINAL_GRACE_S", 0.5)
    monkeypatch.setattr(supervise, "_HANG_CHECK_S", 0.1)
    rule = "-" * 74 + "\n"
    banner = f"{rule}prterun noticed that process rank 1 with PID 4632 on node n2 exited on\nsignal 9 (Killed).\n{rule}"
    began = time.monotonic()
    # What it started the other node's daemon with is still there.
    outcome = run(
        "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); time.sleep(0.5);"
        f"sys.stderr.write({banner!r}); sys.stderr.flush(); subprocess.run(['sleep', '30'])"
    )
    assert outcome.code == -9
    assert str(outcome.failures[0]) == "rank 1 on n2 was ended by signal 9 (Killed)"
    assert 1.0 < time.monotonic() - began < 6


def test_a_launcher_without_ranks_yet_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_FINAL_GRACE_S", 0.2)
    monkeypatch.setattr(supervise, "_HANG_CHECK_S", 0.05)
    assert run("import time; time.sleep(1)", Progress.NOT_STARTED).code == 0


def test_ranks_left_behind_are_killed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    outcome = run(
        "import subprocess, pathlib;"
        "p = subprocess.Popen(['sleep', '30'], process_group=0, stderr=subprocess.DEVNULL);"
        f"pathlib.Path({str(file)!r}).write_text(str(p.pid))"
    )
    assert outcome.code == 0
    state = Path(f"/proc/{file.read_text()}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("progress", "code"), [(Progress.RUNNING, -signal.SIGUSR1), (Progress.NOT_STARTED, -signal.SIGTERM)]
)
def test_a_stop_is_sent_as_the_run_can_take_it(progress: Progress, code: int) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    was_ended = progress is Progress.NOT_STARTED
    assert run("import time; time.sleep(30)", progress) == Outcome(code, (), True, False, was_ended)


def test_a_status_that_vanishes_does_not_undo_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_HANG_CHECK_S", 0.05)
    looks = iter([Progress.RUNNING])
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    program = [sys.executable, "-c", "import time; time.sleep(30)"]
    outcome = supervise.supervise(program, os.environ, lambda: next(looks, Progress.NOT_STARTED))
    assert (outcome.code, outcome.has_begun, outcome.was_ended) == (-signal.SIGUSR1, True, False)


def test_two_stops_before_the_beginning_end_mpirun_once(capfd: Captured) -> None:
    for delay_s in (0.5, 0.7):
        threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGTERM)).start()
    program = (
        "import signal, time; n = []; signal.signal(15, lambda *_: n.append(1));"
        "time.sleep(1.2); print(len(n), flush=True)"
    )
    assert run(program, Progress.NOT_STARTED).was_ended
    assert capfd.readouterr().out == "1\n"


def test_a_reader_that_leaves_stops_the_run_and_loses_only_text(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        program = (
            "import os, signal, sys, time; stop = []; signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))\n"
            "while not stop: os.write(1, b'x' * 1000); time.sleep(0.01)\n"
            "os.write(1, b'x' * 300000); sys.exit(75)"
        )
        outcome = run(program)
    assert outcome == Outcome(75, (), True, False)
    assert b"the run is asked to stop" in outcome.told


def test_a_full_disk_below_the_output_loses_only_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        outcome = run("import time; print('x', flush=True); time.sleep(0.3); print('y')")
    assert outcome == Outcome(0, (), False, False)
    assert outcome.told.count(b"No space left on device") == 1


def test_a_slow_reader_gets_everything_and_signals_still_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    heard: list[bytes] = []

    def read_late() -> None:
        time.sleep(1.0)
        with os.fdopen(reader, "rb") as stream:
            heard.append(stream.read())

    late = threading.Thread(target=read_late)
    late.start()
    timer = threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    program = (
        "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *_: open(2, 'w').write(str(time.time())));"
        "open(1, 'wb').write(b'0123456789' * 100000)"
    )
    began = time.time()
    with os.fdopen(writer, "w") as slow:
        monkeypatch.setattr(sys, "stdout", slow)
        outcome = run(program)
    late.join()
    assert heard == [b"0123456789" * 100000]
    assert outcome.code == 0
    assert 0.4 < float(outcome.told) - began < 0.95


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGHUP))
        timer.start()
        assert run("import time; time.sleep(0.8)") == Outcome(0, (), False, False)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_launch_ids_are_unique() -> None:
    assert len({supervise.new_launch_id() for _ in range(100)}) == 100


RANKS = (
    "import os, subprocess, sys, time\n"
    "def rank(number, seconds): return subprocess.Popen(['sleep', str(seconds)],"
    " env={**os.environ, 'OMPI_COMM_WORLD_RANK': str(number)}, stderr=subprocess.DEVNULL)\n"
)


def survive(program: str, progress: Progress = Progress.RUNNING, num_ranks: int | None = None) -> Outcome:
    command = [sys.executable, "-c", program]
    return supervise.supervise(command, os.environ, lambda: progress, survives_failures=True, num_ranks=num_ranks)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten every wait, so that tests tell the grace periods apart by 0.5, 1.5 and 4 s."""
    monkeypatch.setattr(supervise, "_HANG_CHECK_S", 0.1)
    monkeypatch.setattr(supervise, "_SURVIVING_GRACE_S", 0.5)
    monkeypatch.setattr(supervise, "_INCOMPLETE_GRACE_S", 0.5)
    monkeypatch.setattr(supervise, "_EMPTY_GRACE_S", 1.5)
    monkeypatch.setattr(supervise, "_FINAL_GRACE_S", 4.0)


@pytest.mark.parametrize(("recent_s", "losses"), [(60.0, [1]), (1.0, [])])
def test_a_killed_rank_is_not_the_end_where_ranks_survive(
    quick: None, recent_s: float, losses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_processes, "_RECENT_S", recent_s)
    monkeypatch.setattr(supervise, "_FINAL_GRACE_S", 1.0)
    rule = "-" * 74 + "\n"
    banner = f"{rule}prterun noticed that process rank 1 with PID 4632 on node n2 exited on\nsignal 9 (Killed).\n{rule}"
    outcome = survive(
        f"{RANKS}sys.stderr.write({banner!r}); sys.stderr.flush()\nrank(0, 30); rank(1, 0.5).wait()\ntime.sleep(2.5)"
    )
    assert outcome == Outcome(0, (), False, False)
    assert [failure.rank for failure in outcome.losses] == losses


def test_a_lost_node_is_the_end_also_where_ranks_survive(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_FINAL_GRACE_S", 0.5)
    rule = "-" * 74 + "\n"
    banner = (
        f"{rule}PRTE has lost communication with a remote daemon.\n\n"
        "  HNP daemon   : [prterun-n1-4608@0,0] on node n1\n"
        f"  Remote daemon: [prterun-n1-4608@0,1] on node n2\n\na\nb\nc\nd\n{rule}"
    )
    outcome = survive(f"{RANKS}sys.stderr.write({banner!r}); sys.stderr.flush()\nrank(0, 30).wait()")
    assert outcome.code == -9
    assert [str(failure) for failure in outcome.failures] == ["node n2 was lost: its connection to mpirun broke"]


def test_ranks_that_stay_after_the_end_are_killed_soon_where_they_survive_each_other(quick: None) -> None:
    began = time.monotonic()
    assert survive(f"{RANKS}rank(0, 30).wait()", Progress.FINAL).code == -9
    assert 0.5 < time.monotonic() - began < 2.5


def test_a_rank_that_ends_before_the_run_begins_is_the_end(quick: None) -> None:
    began = time.monotonic()
    outcome = survive(f"{RANKS}first = rank(0, 30); rank(1, 0.5).wait(); first.wait()", Progress.NOT_STARTED)
    assert outcome.code == -9
    assert [failure.rank for failure in outcome.losses] == [1]
    assert 1.0 < time.monotonic() - began < 3.5


def test_a_rank_that_was_never_seen_is_missed(quick: None) -> None:
    outcome = survive(f"{RANKS}rank(0, 30).wait()", Progress.NOT_STARTED, num_ranks=2)
    assert outcome.code == -9
    assert [str(failure) for failure in outcome.losses] == [f"rank 1 on {os.uname().nodename} has ended"]


def test_ranks_that_are_all_there_may_take_their_time(quick: None) -> None:
    outcome = survive(
        f"{RANKS}first, second = rank(0, 2), rank(1, 2); first.wait(); second.wait()", Progress.NOT_STARTED, 2
    )
    assert outcome.code == 0
