"""Threads of a rank: every part is computed once, errors arrive, and nothing is left behind."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress

import numpy as np
import pytest
from numba import njit

from hpcpipe.errors import UsageError
from hpcpipe.kernels import spin
from hpcpipe.kernels.threads import ALONE, GRAIN, Team, cut


@pytest.fixture(params=["pinned", "placed by the system"])
def make_team(request):
    """Make teams; threads are pinned to made-up cores, which may be one and the same processor."""
    teams = []
    mask = os.sched_getaffinity(0)

    def make(num_threads):
        processors = sorted(mask) * num_threads
        cores = [{processor} for processor in processors[:num_threads]] if request.param == "pinned" else ()
        teams.append(Team(num_threads, cores))
        return teams[-1]

    yield make
    for team in teams:
        team.close()
    assert os.sched_getaffinity(0) == mask
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hpcpipe")]


@njit(nogil=True)
def scale(source, factor, out, first, last):
    for i in range(first, last):
        out[i] += factor * source[i]


@pytest.mark.parametrize("grain", [1, 7, 32])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 9])
def test_parts_cover_every_row_once_in_order(num_parts, grain):
    for length in [*range(1, 300), 4096, 50257]:
        parts = cut(length, num_parts, grain)
        assert len(parts) == min(num_parts, -(-length // grain))
        assert (parts[0][0], parts[-1][1]) == (0, length)
        assert all(first < last for first, last in parts)
        assert all(first % grain == 0 for first, _ in parts)
        assert [last for _, last in parts[:-1]] == [first for first, _ in parts[1:]]
        grains = [-(-(last - first) // grain) for first, last in parts]
        assert max(grains) - min(grains) <= 1


def test_no_rows_have_no_parts():
    assert cut(0, 4) == ()
    Team(2).run(lambda *_: pytest.fail("called"), 0)


@pytest.mark.parametrize("num_threads", [1, 2, 4, 5])
def test_threads_compute_what_one_computes(make_team, num_threads):
    team, rng = make_team(num_threads), np.random.default_rng(1)
    for length in (1, 31, 32, 33, 64, 100, 1000, 4096):
        source, out = rng.random(length), np.zeros(length)
        team.run(scale, length, source, 3.0, out)
        assert (out == 3.0 * source).all()


def test_the_caller_computes_the_first_part_and_threads_the_others(make_team):
    team, calls = make_team(3), []
    team.run(lambda first, last: calls.append((first, last, threading.get_ident())), 100)
    calls.sort()
    assert [call[:2] for call in calls] == list(cut(100, 3))
    assert calls[0][2] == threading.get_ident()
    assert len({ident for _, _, ident in calls}) == 3


def test_fewer_rows_than_threads_are_computed_by_fewer(make_team):
    team, calls = make_team(4), []
    for length in (GRAIN + 1, GRAIN, 3 * GRAIN):
        team.run(lambda *part: calls.append(part), length)
    assert sorted(calls) == sorted([(0, 32), (32, 33), (0, 32), (0, 32), (32, 64), (64, 96)])


def test_private_scratch_is_the_thread_s_own(make_team):
    team, scratch = make_team(3), np.zeros((3, 2))
    seen = []

    def note(number, own, first, last):
        seen.append((first, last, number))
        own += first, last

    team.run(note, 5, 7, private=scratch, grain=2)
    assert sorted(seen) == [(0, 2, 7), (2, 4, 7), (4, 5, 7)]
    assert scratch.tolist() == [[0, 2], [2, 4], [4, 5]]
    with pytest.raises(IndexError):
        team.run(note, 5, 7, private=scratch[:2], grain=2)
    assert len(seen) == 3


def test_one_team_is_used_many_times(make_team):
    team, source, out = make_team(2), np.ones(64), np.zeros(64)
    for _ in range(2000):
        team.run(scale, 64, source, 1.0, out)
    assert (out == 2000).all()
    # Longer than a thread spins, so that it has to be woken.
    for _ in range(20):
        time.sleep(0.002)
        team.run(scale, 64, source, 1.0, out)
    assert (out == 2020).all()


def test_one_thread_is_a_plain_call():
    team, idents = Team(1, [{0}]), []
    for used in (team, ALONE):
        used.run(lambda *part: idents.append((part, threading.get_ident())), 100)
    assert idents == [((0, 100), threading.get_ident())] * 2
    assert not team.is_pinned


def test_work_goes_on_at_the_same_time(make_team):
    meeting = threading.Barrier(3, timeout=10)
    make_team(3).run(lambda *_: meeting.wait(), 96)


@pytest.mark.parametrize("failing", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_an_error_arrives_when_all_have_ended(make_team, failing):
    team, ended = make_team(3), []

    def compute(first, last):
        number = first // GRAIN
        if number in failing:
            raise ArithmeticError(number)
        time.sleep(0.05)
        ended.append(number)

    for _ in range(3):
        with pytest.raises(ArithmeticError) as caught:
            team.run(compute, 96)
        assert caught.value.args == (failing[0],)
        assert sorted(ended) == [number for number in range(3) if number not in failing]
        ended.clear()
    out = np.zeros(96)
    team.run(scale, 96, np.ones(96), 1.0, out)
    assert out.all()


def test_an_interrupted_caller_waits_for_the_others(make_team):
    team, ended = make_team(2), []

    def interrupt(*_):
        raise InterruptedError("asked to stop")

    def compute(first, last):
        if first:
            time.sleep(0.2)
            ended.append(first)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(3):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(InterruptedError):
                team.run(compute, 64)
            assert ended.pop() == 32
        team.run(compute, 64)
        assert ended.pop() == 32
    finally:
        signal.signal(signal.SIGALRM, before)


def test_threads_keep_nothing_alive(make_team):
    team = make_team(2)
    array = np.ones(64)
    gone = weakref.ref(array)
    gc.disable()
    try:
        team.run(lambda *_: None, 64, array)
        for row in (0, GRAIN):
            with suppress(ZeroDivisionError):
                team.run(lambda array, first, last, row=row: 1 // (first - row), 64, array)
                pytest.fail("did not raise")
        del array
        assert gone() is None
    finally:
        gc.enable()


def test_a_team_starts_again_after_its_end(make_team):
    team, out = make_team(2), np.zeros(64)
    for _ in range(3):
        team.run(scale, 64, np.ones(64), 1.0, out)
        team.close()
        team.close()
    assert (out == 3).all()


def test_threads_run_where_they_are_pinned():
    mask = sorted(os.sched_getaffinity(0))
    cores = [{processor} for processor in mask]
    team, seen = Team(len(cores), cores), {}
    team.run(lambda first, last: seen.update({first: os.sched_getaffinity(0)}), len(cores), grain=1)
    team.close()
    assert team.is_pinned == (len(cores) > 1)
    if team.is_pinned:
        assert [seen[first] for first in sorted(seen)] == cores
    assert os.sched_getaffinity(0) == set(mask)


def test_threads_share_the_cores_out_in_order():
    team, seen = Team(2, [{0, 4}, {1, 5}, {2, 6}]), []
    pins, os.sched_setaffinity = os.sched_setaffinity, lambda _, processors: seen.append(set(processors))
    try:
        team.run(lambda *_: None, 64)
    finally:
        os.sched_setaffinity = pins
        team.close()
    assert sorted(seen, key=min) == [{0, 4}, {1, 2, 5, 6}]


def test_too_few_cores_pin_nothing():
    assert not Team(3, [{0}, {1}]).is_pinned
    assert not Team(2).is_pinned


def test_threads_that_the_system_refuses_are_counted(monkeypatch):
    start, started = threading.Thread.start, []

    def refuse(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(UsageError, match=r"parallel\.threads = 8: .* no more than 3 threads .* parallel\.threads = 3"):
        Team(8).run(lambda *_: None, 1000)
    assert not any(thread.is_alive() for thread in started)


SCRIPT = """
import os
import numpy as np
from hpcpipe.kernels.threads import Team

def fill(out, first, last):
    out[first:last] += 1

team, out = Team(2), np.zeros(64)
team.run(fill, 64, out)
child = os.fork()
team.run(fill, 64, out)
assert (out == 2).all()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_has_threads_of_its_own_and_the_end_waits_for_none():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)


def test_a_word_of_another_thread_is_seen():
    words = np.zeros(32, np.int64)
    own, other = words.ctypes.data, words[16:].ctypes.data
    assert not spin.exchange(own, 5, other, 7, 10)
    assert (words[0], words[16]) == (5, 0)
    words[16] = 7
    assert spin.exchange(own, 6, other, 7, 1)
    # What is watched is read again and again, although nothing in the loop writes it.
    words[16] = 0
    writer = threading.Timer(0.05, lambda: spin.exchange(other, 8, own, 0, 0))
    writer.start()
    assert spin.exchange(own, 6, other, 8, 10**9)
    writer.join()
