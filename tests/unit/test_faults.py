"""Injected faults: what HPCPIPE_FAULT may say, and that a fault happens exactly where and as often as it says."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpcpipe.errors import UsageError
from hpcpipe.faults import hooks
from hpcpipe.faults.inject import UNUSED_TAG, InjectedError, Injector
from hpcpipe.faults.parse import DATA, Fault, parse


@pytest.fixture(autouse=True)
def no_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HPCPIPE_FAULT", raising=False)
    yield
    hooks.active = None


def injector(text: str, process: int = 0, step: int | None = None, rank: int | None = None) -> Injector:
    made = Injector(parse(text), process)
    made.step, made.rank = step, rank
    return made


def test_a_fault_is_read() -> None:
    text = "kill:process=2:step=5:phase=forward:microbatch=1"
    assert parse(text) == (Fault("kill", text, 2, None, 5, 5, "forward", microbatch=1),)


def test_several_faults_are_read() -> None:
    first, second = parse("slow:step=10-30:factor=2.5; flip:in=moment:bit=30:times=0 ;")
    assert (first.kind, first.first_step, first.last_step, first.factor) == ("slow", 10, 30, 2.5)
    assert first.times == math.inf
    assert (second.data, second.bit, second.times) == ("moment", 30, math.inf)


def test_nothing_is_no_fault() -> None:
    assert parse("") == parse(" ; ") == ()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("kil:process=1", "did you mean 'kill'?"),
        ("kill:proces=1", "did you mean 'process'?"),
        ("kill:process", "'process' is no condition"),
        ("kill:process=-1", "'process=-1'"),
        ("kill:process=1:process=2", "'process' is given twice"),
        ("kill:phase=forwards", "did you mean 'forward'?"),
        ("kill:step=5-3", "step 3 comes before step 5"),
        ("kill:step=x", "'step=x'"),
        ("kill:probability=1.5", "from 0 to 1"),
        ("kill:after=soon", "'after=soon'"),
        ("nan:step=1", "in=WHAT"),
        ("nan:in=wieght", "did you mean 'weight'?"),
        ("kill:in=weight", "its 'phase'"),
        ("flip:in=weight:phase=forward", "'phase' is not for 'flip'"),
        ("stop:seconds=nan", "'seconds=nan'"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(f"exit:step=1;{text}")
    assert part in str(caught.value)
    assert f"HPCPIPE_FAULT: '{text}'" in str(caught.value)


def test_an_unset_variable_injects_nothing() -> None:
    hooks.begin(0)
    assert hooks.active is None
    hooks.enter_step(1)
    hooks.point("forward", 1)
    hooks.corrupt("weight", [np.zeros(3)])
    assert hooks.receive_tag(7, 1) == 7


def test_a_bad_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPIPE_FAULT", "explode")
    with pytest.raises(UsageError, match="no fault 'explode'"):
        hooks.begin(0)


@pytest.mark.parametrize(
    ("condition", "met", "not_met"),
    [
        ("process=2", {"process": 2}, {"process": 1}),
        ("rank=2", {"rank": 2}, {"rank": 1}),
        ("rank=2", {"rank": 2}, {"rank": None}),
        ("step=5", {"step": 5}, {"step": 4}),
        ("step=5", {"step": 5}, {"step": None}),
        ("step=5-7", {"step": 7}, {"step": 8}),
    ],
)
def test_conditions(condition: str, met: dict[str, int], not_met: dict[str, int]) -> None:
    with pytest.raises(InjectedError):
        injector(f"raise:{condition}", **met).point("forward", 0)
    injector(f"raise:{condition}", **not_met).point("forward", 0)


def test_phase_and_microbatch_are_conditions() -> None:
    made = injector("raise:phase=backward:microbatch=1")
    made.point("forward", 1)
    made.point("backward", 0)
    made.point("backward")
    with pytest.raises(InjectedError, match="injected: raise:phase=backward"):
        made.point("backward", 1)


@pytest.mark.parametrize(("times", "expected"), [("", 1), (":times=3", 3), (":times=0", 10)])
def test_a_fault_fires_as_often_as_it_says(times: str, expected: int) -> None:
    made, count = injector(f"raise{times}"), 0
    for _ in range(10):
        try:
            made.point("forward")
        except InjectedError:
            count += 1
    assert count == expected


def test_a_probability_is_one() -> None:
    made, count = injector("raise:probability=0.2:times=0"), 0
    for _ in range(1000):
        try:
            made.point("forward")
        except InjectedError:
            count += 1
    assert 140 < count < 260


def test_memory_cannot_be_allocated() -> None:
    with pytest.raises(MemoryError):
        injector("memory").point("update")


def test_no_more_files_can_be_opened() -> None:
    then = """try:
    hooks.point('forward')
    open('/dev/null')
except OSError as error:
    print(error.strerror)"""
    assert b"Too many open files" in child("files", then).communicate(timeout=10)[0]


@pytest.mark.parametrize("shift", [3600, -7200.5])
def test_the_clock_jumps(shift: float) -> None:
    then = """import time
before, since = time.time(), time.monotonic()
hooks.point('forward')
shown = time.mktime(time.gmtime()) - time.mktime(time.gmtime(before))
print(time.time() - before, time.monotonic() - since, shown)"""
    answer = child(f"clock:shift={shift}", then).communicate(timeout=10)[0].split(b"\n")[0]
    assert [float(word) for word in answer.split()] == [pytest.approx(each, abs=1.1) for each in (shift, 0, shift)]


def test_the_program_exits() -> None:
    with pytest.raises(SystemExit) as caught:
        injector("exit:code=3").point("update")
    assert caught.value.code == 3


def test_a_slow_process_takes_as_many_times_longer() -> None:
    made = injector("slow:factor=4")
    made.point("forward")
    start, cpu = time.perf_counter(), time.thread_time()
    while time.thread_time() - cpu < 0.05:
        pass
    computed = time.perf_counter() - start
    made.point("forward")
    assert time.perf_counter() - start - computed > 0.14
    start = time.perf_counter()
    time.sleep(0.05)
    made.point("forward")
    assert time.perf_counter() - start < 0.1, "waiting is not slowed"


@pytest.mark.parametrize("dtype", ["f4", "f8", "u2"])
@pytest.mark.parametrize("data", DATA)
def test_one_exponent_bit_is_flipped(data: str, dtype: str) -> None:
    numbers = np.random.default_rng(1).integers(1, 2**15, 50).astype(dtype)
    arrays = [numbers.copy(), np.zeros((0, 2), dtype), numbers.reshape(5, 10).copy()]
    injector(f"flip:in={data}:seed=4").corrupt(data, arrays)
    before = np.concatenate([numbers, numbers]).view(f"u{numbers.itemsize}")
    changed = before ^ np.concatenate([array.ravel() for array in arrays]).view(before.dtype)
    (found,) = changed[changed != 0]
    assert found in [1 << bit for bit in {"f4": range(23, 31), "f8": range(52, 63), "u2": range(7, 15)}[dtype]]


def test_the_bit_and_the_element_can_be_chosen() -> None:
    places = set()
    for seed in range(20):
        array = np.zeros(1000, "f4")
        injector(f"flip:in=weight:bit=3:seed={seed}").corrupt("weight", [array])
        assert array.view("u4").sum() == 8
        places.add(int(array.argmax()))
    assert len(places) > 15


@pytest.mark.parametrize(("kind", "test"), [("nan", np.isnan), ("inf", np.isposinf)])
def test_a_number_is_not_finite(kind: str, test: np.ufunc) -> None:
    array = np.ones((3, 4), np.float32)
    made = injector(f"{kind}:in=activation:microbatch=1")
    made.corrupt("activation", [array], 0)
    made.corrupt("gradient", [array], 1)
    assert np.isfinite(array).all()
    made.corrupt("activation", [array], 1)
    assert test(array).sum() == 1
    words = np.ones(4, np.uint16)
    injector(f"{kind}:in=message").corrupt("message", [words])
    assert test((words.astype(np.uint32) << 16).view(np.float32)).sum() == 1


def test_a_wrong_tag() -> None:
    made = injector("wrongtag:step=3:microbatch=1", step=3)
    assert made.tag(8, 0) == 8
    assert made.tag(8, 1) == UNUSED_TAG
    assert made.tag(8, 1) == 8


def child(fault: str, then: str = "hooks.point('forward')") -> "subprocess.Popen[bytes]":
    code = f"from hpcpipe.faults import hooks\nhooks.begin(1)\nprint('ready', flush=True)\n{then}\nprint('after')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], bufsize=0, stdout=subprocess.PIPE, env={**os.environ, "HPCPIPE_FAULT": fault}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]


def wait_for_state(pid: int, wanted: str) -> None:
    deadline = time.monotonic() + 10
    while state(pid) != wanted:
        assert time.monotonic() < deadline, f"{state(pid)}, not {wanted}"
        time.sleep(0.01)


def test_a_process_kills_itself() -> None:
    process = child("kill:process=1:phase=forward")
    assert process.wait(10) == -signal.SIGKILL
    assert child("kill:process=2:phase=forward").wait(10) == 0


def test_a_kill_at_a_moment_needs_no_place() -> None:
    start = time.monotonic()
    process = child("kill:after=0.3", "import time; time.sleep(20)")
    assert process.wait(10) == -signal.SIGKILL
    assert time.monotonic() - start < 9


def test_a_stopped_process_goes_on() -> None:
    process = child("stop:seconds=0.5")
    wait_for_state(process.pid, "T")
    assert process.wait(10) == 0


def test_a_stopped_process_does_not_go_on_by_itself() -> None:
    process = child("stop")
    wait_for_state(process.pid, "T")
    time.sleep(0.5)
    assert state(process.pid) == "T"
    process.kill()
    process.wait(10)


def test_a_spinning_process_lets_no_thread_run() -> None:
    threads = "import threading; threading.Timer(0.3, print, ('tick',)).start(); hooks.point('forward')"
    process = child("spin", threads)
    time.sleep(1)
    assert process.poll() is None
    assert state(process.pid) == "R"
    process.kill()
    assert process.communicate(timeout=10)[0] == b""
