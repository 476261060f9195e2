"""What ranks show of themselves, what is concluded from it, and what is kept of it."""

import errno
import json
import os
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpcpipe.cli.main import main
from hpcpipe.errors import DamagedError, ExitCode, Interruption, RankError
from hpcpipe.schedule.action import Action, Kind
from hpcpipe.watch import flight, memory, start
from hpcpipe.watch.beacon import Beacon, NoBeacon
from hpcpipe.watch.graph import at_fault, describe_deadlock, find_cycle, signature
from hpcpipe.watch.layout import (
    COMMAND_AT,
    RECORD_BYTES,
    RING_RECORDS,
    SLOT_HEADER_BYTES,
    STATE,
    STATE_AT,
    TEXT_AT,
    TEXT_BYTES,
    Command,
    Phase,
    Record,
    State,
    read_identity,
    read_ring,
    read_state,
    write_text,
)
from hpcpipe.watch.memory import MemoryFile, memory_name, remove_leftovers, sweep
from hpcpipe.watch.pace import Pace
from hpcpipe.watch.story import tell
from hpcpipe.watch.verdict import Rank, find_culprits, find_slow, is_deadlock, is_straggling

RECEIVE = Action(Kind.RECV_F, 2, 1)


@pytest.fixture
def file(tmp_path):
    found = MemoryFile(tmp_path / "hpcpipe-test", 2, 2)
    yield found
    found.close()


@pytest.fixture
def beacon(file):
    one = Beacon(file, 1, 7)
    one.configure(10.0)
    return one


def shown(file: MemoryFile) -> State:
    state = read_state(file.slot(1))
    assert state is not None
    return state


class TestShowing:
    def test_a_rank_shows_who_it_is_and_what_it_does(self, file, beacon):
        beacon.epoch(3, 2)
        beacon.phase(Phase.TRAIN)
        beacon.step(12)
        beacon.begin(Kind.F, 2, 1)
        identity, state = read_identity(file.slot(1)), shown(file)
        assert (identity.process, identity.pid, identity.hang_ns) == (7, os.getpid(), 10**10)
        assert (state.phase, state.step, state.epoch) == (Phase.TRAIN, 12, 3)
        assert (state.kind, state.stage, state.microbatch, state.wait) == ("F", 2, 1, "")
        assert read_identity(file.slot(0)).process == -1

    def test_it_shows_what_it_waits_for_and_that_it_lives(self, file, beacon):
        beacon.begin(Kind.F, 2, 1)
        beacon.nap("RECV", RECEIVE, 1, 17, lambda: "x")
        first = shown(file)
        assert (first.wait, first.wait_stage, first.wait_microbatch, first.peer, first.tag) == ("RECV_F", 2, 1, 1, 17)
        assert first.kind == "F"
        beacon.nap("RECV", RECEIVE, 1, 17, lambda: "x")
        assert shown(file).events == first.events
        beacon.waited("RECV", RECEIVE, 1, 17, time.perf_counter())
        assert shown(file).wait == "" and shown(file).events == first.events + 1

    def test_records_tell_what_it_did(self, file, beacon):
        beacon.step(5)
        start_s = time.perf_counter()
        beacon.begin(Kind.B, 3, 2)
        beacon.posted("SEND", Action(Kind.SEND_B, 3, 2), 6, 9, 4096)
        beacon.waited("RECV", "row of replica", 4, 1, start_s)
        beacon.end()
        _, sent, waited, done = read_ring(file.slot(1)[SLOT_HEADER_BYTES:])
        assert (sent.kind, sent.peer, sent.tag, sent.num_bytes, sent.waited) == ("SEND_B", 6, 9, 4096, False)
        assert (waited.kind, waited.stage, waited.waited) == ("RECV", -1, True) and waited.start_ns < waited.end_ns
        assert (done.kind, done.stage, done.microbatch, done.step) == ("B", 3, 2, 5)
        assert done.start_ns <= sent.start_ns <= done.end_ns

    def test_the_ring_keeps_the_newest(self, file, beacon):
        for step in range(1, RING_RECORDS + 101):
            beacon.step(step)
        records = read_ring(bytes(file.slot(1)[SLOT_HEADER_BYTES:]))
        assert [record.step for record in records] == list(range(101, RING_RECORDS + 101))

    @pytest.mark.parametrize("cut", range(8, RECORD_BYTES, 8))
    def test_a_record_that_is_half_written_is_left_out(self, file, beacon, cut):
        for step in range(1, RING_RECORDS + 2):
            beacon.step(step)
        ring = bytearray(file.slot(1)[SLOT_HEADER_BYTES:])
        # The next record would take the second place.
        old, new = ring[RECORD_BYTES : 2 * RECORD_BYTES], struct.pack("<q", RING_RECORDS + 2)
        ring[RECORD_BYTES : 2 * RECORD_BYTES] = (new + bytes(cut - 8) + old[cut:])[:RECORD_BYTES]
        assert [record.step for record in read_ring(bytes(ring))] == list(range(3, RING_RECORDS + 2))

    @pytest.mark.parametrize("cut", range(8, STATE.size, 8))
    def test_a_state_that_is_half_written_is_not_taken(self, file, beacon, cut):
        old = bytes(file.slot(1)[STATE_AT : STATE_AT + STATE.size])
        beacon.step(5)
        new = bytes(file.slot(1)[STATE_AT : STATE_AT + STATE.size])
        assert read_state(file.slot(1)) is not None
        file.slot(1)[STATE_AT : STATE_AT + STATE.size] = new[:cut] + old[cut:]
        assert read_state(file.slot(1)) is None

    def test_a_reader_never_sees_two_states_mixed(self, file, beacon):
        done = threading.Event()

        def write() -> None:
            for number in range(30_000):
                beacon.begin(Kind.F, number % 1000, number % 1000)
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        seen = set()
        while not done.is_set():
            state = read_state(file.slot(1))
            if state is not None and state.kind:
                assert state.stage == state.microbatch
                seen.add(state.stage)
        thread.join()
        assert len(seen) > 1

    def test_rubbish_is_no_state_and_no_records(self):
        rubbish = bytes(range(256)) * 1024
        assert read_state(rubbish) is None and read_ring(rubbish[: 64 * RECORD_BYTES]) == []


class TestDeadlines:
    def limit_s(self, file):
        return shown(file).limit_ns / 1e9

    def work(self, beacon, monkeypatch, seconds):
        """Do an action that takes so long by the clock."""
        now = [0]
        monkeypatch.setattr("hpcpipe.watch.beacon._monotonic_ns", lambda: now[0])
        beacon.begin(Kind.F, 0, 0)
        now[0] = int(seconds * 1e9)
        beacon.end()
        beacon.begin(Kind.F, 0, 0)

    def test_there_is_none_while_a_run_is_set_up(self, file, beacon):
        assert self.limit_s(file) == 0

    def test_the_first_steps_have_more_time(self, file, beacon):
        beacon.phase(Phase.TRAIN)
        beacon.step(1)
        assert self.limit_s(file) == 30
        beacon.expect(8.0)
        beacon.step(2)
        assert self.limit_s(file) == 40
        for step in range(3, 8):
            beacon.step(step)
        assert self.limit_s(file) == 10

    def test_slow_actions_get_five_times_as_long(self, file, beacon, monkeypatch):
        beacon.phase(Phase.TRAIN)
        beacon.step(1)
        self.work(beacon, monkeypatch, 4.0)
        assert self.limit_s(file) == pytest.approx(20)

    def test_an_outlier_only_doubles_what_is_usual(self, file, beacon, monkeypatch):
        beacon.phase(Phase.TRAIN)
        beacon.step(1)
        self.work(beacon, monkeypatch, 1.5)
        for step in range(2, 8):
            beacon.step(step)
        assert self.limit_s(file) == 10
        self.work(beacon, monkeypatch, 60.0)
        assert self.limit_s(file) == pytest.approx(15)

    def test_other_phases_have_others(self, file, beacon):
        limits = {}
        for phase in Phase:
            beacon.phase(phase)
            limits[phase] = self.limit_s(file)
        assert limits[Phase.CHECKPOINT] > limits[Phase.RECOVER] > limits[Phase.EVALUATE] > limits[Phase.SPARE] == 10
        assert limits[Phase.SETUP] == limits[Phase.FINISH] == limits[Phase.ENDED] == 0

    def test_zero_switches_it_off(self, file, beacon):
        beacon.configure(0.0)
        for phase in Phase:
            beacon.phase(phase)
            assert self.limit_s(file) == 0


class TestCommands:
    def tell(self, file, command, text):
        write_text(file.slot(1), TEXT_AT, TEXT_BYTES, text)
        (before,) = struct.unpack_from("<q", file.slot(1), COMMAND_AT)
        struct.pack_into("<q", file.slot(1), COMMAND_AT, ((before >> 8) + 1) << 8 | command)

    def test_a_rank_that_waits_does_what_it_is_told_once(self, file, beacon):
        self.tell(file, Command.RESET, "all wait")
        with pytest.raises(Interruption, match="all wait"):
            beacon.nap("ALL", None, -1, -1, str)
        beacon.nap("ALL", None, -1, -1, str)
        self.tell(file, Command.GIVE_UP, "who waits for whom\n  0 for 1")
        with pytest.raises(RankError, match="0 for 1") as caught:
            beacon.nap("ALL", None, -1, -1, str)
        assert caught.value.on_all_ranks

    def test_a_request_to_recover_is_void_after_a_recovery(self, file, beacon):
        self.tell(file, Command.RESET, "all wait")
        beacon.epoch(1, 0)
        beacon.nap("ALL", None, -1, -1, str)
        self.tell(file, Command.GIVE_UP, "over")
        beacon.epoch(2, 0)
        with pytest.raises(RankError):
            beacon.nap("ALL", None, -1, -1, str)

    def test_notes_are_printed_by_the_process_that_they_are_for(self, file, beacon, capfd):
        file.add_note(6, "for another")
        file.add_note(7, "for this one")
        beacon.nap("ALL", None, -1, -1, str)
        beacon.nap("ALL", None, -1, -1, str)
        assert capfd.readouterr().err == "hpcpipe: for this one\n"

    def test_a_supervisor_that_is_gone_is_started_again(self, file, monkeypatch):
        started = []
        beacon = Beacon(file, 1, 7, lambda: started.append(1))
        file.sign(4711, time.monotonic_ns())
        now = time.monotonic_ns()
        monkeypatch.setattr("hpcpipe.watch.beacon._monotonic_ns", lambda: now + int(3e9))
        beacon.nap("ALL", None, -1, -1, str)
        assert started == []
        monkeypatch.setattr("hpcpipe.watch.beacon._monotonic_ns", lambda: now + int(20e9))
        beacon.nap("ALL", None, -1, -1, str)
        assert started == [1]


BUSY = State(9, Phase.TRAIN, "F", "", 1, 0, -1, -1, -1, -1, 12, 0, 1000, 900, 10**10, 0)


def rank(process, quiet_s=0.1, *, peer=None, tag=5, silent_s=0.1, mode="S", event_ns=1000, kind="RECV_F", **changes):
    """Return a rank that computes, or that waits for a peer."""
    state = replace(BUSY, event_ns=event_ns, **changes)
    if peer is not None:
        state = replace(state, wait=kind, wait_stage=process, wait_microbatch=0, peer=peer, tag=tag)
        return Rank(process, state, quiet_s, silent_s, process, mode, "all 4 ranks to meet" if peer < 0 else "")
    return Rank(process, state, quiet_s, quiet_s, process, mode)


def culprits(*ranks):
    return [one.process for one in find_culprits(ranks)]


class TestCulprits:
    def test_nobody_while_all_are_in_time(self):
        assert culprits(rank(0, 9.9), rank(1, 50.0, peer=0), rank(2, 50.0, peer=1)) == []

    def test_who_computes_beyond_the_deadline(self):
        assert culprits(rank(0, 12.0, peer=1), rank(1, 12.0), rank(2, 12.0, peer=1)) == [1]

    def test_who_waits_without_a_sign_of_life(self):
        assert culprits(rank(0, 12.0, peer=1), rank(1, 12.0, peer=0, silent_s=11.0)) == [1]

    def test_of_two_the_one_that_does_not_wait(self):
        first, second = rank(0, 12.0, peer=1, silent_s=12.0, event_ns=1), rank(1, 12.0, event_ns=2)
        assert culprits(first, second) == [1]

    def test_of_two_that_compute_the_first(self):
        assert culprits(rank(0, 11.0, event_ns=20), rank(1, 12.0, event_ns=10)) == [1]

    def test_whoever_is_stuck_in_a_recovery_comes_after_whoever_holds_it_up(self):
        recovering = rank(0, 70.0, event_ns=1, phase=Phase.RECOVER, limit_ns=6 * 10**10)
        assert culprits(recovering, rank(1, 70.0, event_ns=2)) == [1]
        assert culprits(recovering) == [0]

    def test_all_who_are_suspended(self):
        assert culprits(rank(0, 12.0, mode="T"), rank(1, 12.0, mode="T"), rank(2, 12.0)) == [0, 1]

    def test_not_if_everybody_is(self):
        assert culprits(rank(0, 12.0, mode="T"), rank(1, 12.0, mode="T")) == []
        assert culprits(rank(0, 12.0, mode="T")) == [0]

    def test_not_who_is_held_by_a_debugger(self):
        assert culprits(rank(0, 1000.0, mode="t"), rank(1, 1000.0, peer=0)) == []

    def test_who_waits_for_a_device_gets_more_time(self):
        assert culprits(rank(0, 50.0, mode="D"), rank(1)) == []
        assert culprits(rank(0, 61.0, mode="D"), rank(1)) == [0]

    def test_nobody_without_a_deadline(self):
        assert culprits(rank(0, 1e6, limit_ns=0), rank(1, 1e6, peer=0, silent_s=1e6, limit_ns=0)) == []

    def test_stragglers_are_found_long_before(self):
        assert not is_straggling(rank(0, 1.9)) and is_straggling(rank(0, 2.1))
        assert not is_straggling(rank(0, 9.0, peer=1)) and is_straggling(rank(0, 9.0, peer=1, silent_s=2.1))


class TestPace:
    def paces(self, *times):
        pace = Pace()
        return [pace.add(one) for one in times]

    def test_a_rank_that_gets_slower_is_known_five_steps_later(self):
        paces = self.paces(9.0, 9.0, *[1.0] * 7, *[3.0] * 6)
        assert paces[10] == 1.0 and paces[12] < 2.0 and paces[13] == paces[14] == 3.0

    def test_single_steps_do_not_count_and_nothing_is_said_of_the_first(self):
        assert self.paces(*[1.0] * 10) == [0.0] * 10
        assert self.paces(*[1.0] * 11, 50.0, 50.0, 50.0, 50.0, 1.0, 50.0)[-1] < 2.0
        assert self.paces(*[1.0] * 12)[-1] == 1.0

    def test_only_who_is_slower_than_the_others_is_blamed(self):
        def slow(*paces):
            return [one.process for one in find_slow([replace(rank(n), pace=pace) for n, pace in enumerate(paces)])]

        assert slow(1.0, 3.0, 1.1) == [1]
        assert slow(1.0, 1.9) == [] == slow(3.0, 2.5) == slow(1.6, 3.0, 1.8) == slow(3.0, 0.0)


class TestDeadlocks:
    def test_all_wait_and_are_well(self):
        assert is_deadlock([rank(0, 10.1, peer=1), rank(1, 10.1, peer=0)])

    @pytest.mark.parametrize(
        "other",
        [rank(1, 10.1), rank(1, 9.9, peer=0), rank(1, 10.1, peer=0, silent_s=3.0), rank(1, 20.0, peer=0, limit_ns=0)],
        ids=["computes", "has moved", "gives no sign of life", "has no deadline"],
    )
    def test_not_if_one(self, other):
        assert not is_deadlock([rank(0, 10.1, peer=1), other])

    def test_spares_do_not_count(self):
        spare = replace(rank(2, 0.0), state=replace(BUSY, phase=Phase.SPARE))
        assert is_deadlock([rank(0, 10.1, peer=1), rank(1, 10.1, peer=0), spare])
        assert not is_deadlock([spare])

    def test_cycles(self):
        assert find_cycle([rank(0, peer=1), rank(1, peer=0)]) == [0, 1]
        assert find_cycle([rank(0, peer=1), rank(1, peer=2), rank(2, peer=3), rank(3, peer=1)]) == [1, 2, 3]
        assert find_cycle([rank(0, peer=1), rank(1, peer=2), rank(2)]) == []
        # All but one are in a collective, and that one waits for one of them.
        assert find_cycle([rank(0, peer=-1), rank(1, peer=2), rank(2, peer=-1)]) == [1, 2]

    def test_a_graph_says_who_waits_for_whom(self):
        ranks = [rank(0, 10.0, peer=1, tag=3), rank(1, 10.0, peer=0, kind="SEND_B"), rank(2, 10.0, peer=-1, kind="ALL")]
        assert describe_deadlock(ranks, {}) == [
            "process 0 (rank 0), step 12, F1.0, waits for RECV_F0.0 from process 1, tag 3, for 10.0 s",
            "process 1 (rank 1), step 12, F1.0, waits for process 0, tag 5 to take SEND_B1.0, for 10.0 s",
            "process 2 (rank 2), step 12, F1.0, waits for all 4 ranks to meet, for 10.0 s",
            "cycle: process 0 -> 1 -> 0",
            "process 1 has sent process 0 nothing with tag 3 in step 12",
        ]

    def test_the_end_whose_tag_has_changed_is_at_fault(self):
        def posted(number, kind, peer, tag, step):
            return Record(number, number, kind, False, Phase.TRAIN, 1, 0, peer, tag, step, 0, 64, number)

        ranks = [rank(0, 10.0, peer=1, kind="SEND_F"), rank(1, 10.0, peer=0, tag=999)]
        sender = [posted(1, "SEND_F", 1, 5, 11), posted(2, "SEND_F", 1, 5, 12)]
        receiver = [posted(1, "RECV_F", 0, 5, 11), posted(2, "RECV_F", 0, 999, 12)]
        lines = describe_deadlock(ranks, {0: sender, 1: receiver})
        assert at_fault(lines) == "process 1 is at fault: it posted RECV_F1.0 with tag 999, before with 5"
        assert "it has sent SEND_F1.0 with tag 5, which process 1 does not receive" in lines[-1]
        # A message that is only late is nobody's fault.
        ranks = [rank(0, 10.0, peer=1, kind="SEND_F"), rank(1, 10.0, peer=0, tag=5)]
        assert at_fault(describe_deadlock(ranks, {0: sender[:1], 1: receiver[:1]})) == ""

    def test_a_signature_is_the_same_in_the_next_epoch_and_not_in_the_next_step(self):
        ranks = [rank(0, 10.0, peer=1), rank(1, 10.0, peer=0)]
        again = [replace(one, quiet_s=20.0, state=replace(one.state, epoch=2, event_ns=5)) for one in reversed(ranks)]
        later = [replace(one, state=replace(one.state, step=13)) for one in ranks]
        assert signature(ranks) == signature(again) != signature(later)


class TestMemory:
    def test_every_rank_of_a_node_finds_the_same_file(self, tmp_path):
        environ = {"HPCPIPE_LAUNCH_ID": "abc", "PMIX_SERVER_URI2": "one"}
        assert memory_name(environ) == memory_name({**environ, "OMPI_COMM_WORLD_RANK": "3"})
        assert memory_name(environ) != memory_name({**environ, "PMIX_SERVER_URI2": "two"})
        assert memory_name(environ).startswith("hpcpipe-abc-")
        first, second = MemoryFile(tmp_path / "f", 1, 4), MemoryFile(tmp_path / "f", 3, 4)
        assert first.has_grown() and second.num_slots == 3 and second.num_processes == 4
        assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600

    def test_a_file_of_another_version_is_refused(self, tmp_path):
        MemoryFile(tmp_path / "f", 1, 1).view[8:12] = struct.pack("<I", 99)
        with pytest.raises(OSError, match="version"):
            MemoryFile(tmp_path / "f", 1, 1)

    def test_a_link_is_not_followed(self, tmp_path):
        (tmp_path / "victim").write_bytes(b"x")
        (tmp_path / "f").symlink_to(tmp_path / "victim")
        with pytest.raises(OSError):
            MemoryFile(tmp_path / "f", 1, 1)
        assert (tmp_path / "victim").read_bytes() == b"x"

    def test_leftovers_of_a_launch_are_removed(self, tmp_path):
        for name in ("hpcpipe-a-1", "hpcpipe-a-2", "hpcpipe-b-1"):
            (tmp_path / name).touch()
        remove_leftovers("a", 0.0, tmp_path)
        remove_leftovers("", 0.0, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["hpcpipe-b-1"]


def test_files_of_launches_that_were_killed_are_swept_away(tmp_path):
    alive, dead, new = (MemoryFile(tmp_path / f"hpcpipe-{name}-1", 1, 1) for name in ("alive", "dead", "new"))
    Beacon(alive, 0, 0)
    Beacon(dead, 0, 0)
    struct.pack_into("<q", dead.slot(0), 16, 1)
    (tmp_path / "hpcpipe-other-1").write_bytes(b"x")
    (tmp_path / "hpcpipe-folder-1").mkdir()
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    for one in (alive, dead):
        struct.pack_into("<q", one.view, 32, time.monotonic_ns() - 61 * 10**9)
    supervised = MemoryFile(dead.path, 0)
    assert supervised.claim()
    sweep(tmp_path)
    assert dead.path.exists()
    supervised.close()
    sweep(tmp_path)
    assert alive.path.exists() and new.path.exists() and not dead.path.exists()


RANK_0 = {
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "HPCPIPE_LAUNCH_ID": "unit",
}


class TestStart:
    @pytest.fixture(autouse=True)
    def no_process(self, monkeypatch):
        self.started = []
        monkeypatch.setattr(start, "start_supervisor", self.started.append)

    def test_a_process_on_its_own_is_not_watched(self, tmp_path):
        assert type(start.attach(None, print, {}, tmp_path)) is NoBeacon and list(tmp_path.iterdir()) == []

    def test_one_rank_of_a_node_starts_its_supervisor(self, tmp_path):
        said = []
        assert type(start.attach(None, said.append, RANK_0, tmp_path)) is Beacon
        second = {**RANK_0, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
        assert type(start.attach(None, said.append, second, tmp_path)) is Beacon
        (path,) = tmp_path.iterdir()
        assert self.started == [path] and said == [] and MemoryFile(path, 0).num_slots == 2

    def test_without_shared_memory_the_file_is_on_disk(self, tmp_path):
        said = []
        beacon = start.attach(tmp_path, said.append, RANK_0, tmp_path / "absent")
        assert type(beacon) is Beacon and len(list(tmp_path.iterdir())) == 1
        assert len(said) == 1 and "absent: No such file" in said[0]

    def test_a_full_file_system_never_ends_a_run(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(memory.os, "posix_fallocate", full)
        said = []
        assert type(start.attach(tmp_path, said.append, RANK_0, tmp_path)) is NoBeacon
        assert len(said) == 1 and "hangs are not looked for" in said[0] and "No space left" in said[0]


@pytest.fixture
def run_directory(tmp_path, file):
    """A run with the flight recorders of two ranks, one of which waits for the other."""
    beacons = [Beacon(file, slot, slot) for slot in range(2)]
    for one in beacons:
        one.epoch(0, 0)
        one.phase(Phase.TRAIN)
        one.step(3)
    beacons[0].begin(Kind.F, 0, 0)
    beacons[0].end()
    beacons[0].posted("SEND", Action(Kind.SEND_F, 0, 0), 1, 2, 100)
    beacons[1].nap("RECV", Action(Kind.RECV_F, 1, 0), 0, 2, str)
    beacons[0].begin(Kind.B, 0, 1)
    contents = {number: flight.pack(file.slot(number)) for number in range(2)}
    flight.save(tmp_path, "20260101T000000Z-1-1", contents, {"what": "hang", "text": "process 0 hangs"})
    (tmp_path / "events.jsonl").write_text('{"time": "t", "event": "hang", "cause": "process 0 hangs"}\n')
    return tmp_path


class TestFlights:
    def test_a_recorder_reads_back(self, run_directory):
        flights, cause = flight.load(flight.list_flights(run_directory)[0])
        assert cause["what"] == "hang" and sorted(flights) == [0, 1]
        story = tell(flights, cause, 3)
        assert "computes" in story.processes[0] and "waits for RECV_F1.0 from process 0" in story.processes[1]
        assert [entry.text for entry in story.entries[-2:]] == [
            "F0.0",
            "posted SEND_F0.0 to process 1, tag 2, 100 bytes",
        ]
        befores = [entry.before_s for entry in story.entries]
        assert befores == sorted(befores, reverse=True) and 0 <= befores[-1] < 60

    def test_only_the_newest_are_kept(self, tmp_path, file):
        for number in range(flight.KEPT + 3):
            flight.save(tmp_path, f"2026010{number:02d}", {0: flight.pack(file.slot(0))}, {})
        assert [path.name[-2:] for path in flight.list_flights(tmp_path)] == [
            f"{n:02d}" for n in range(3, flight.KEPT + 3)
        ]

    @pytest.mark.parametrize("content", [b"", b"HPCFLGHT", b"x" * 200_000], ids=["empty", "short", "rubbish"])
    def test_what_is_no_recorder_is_refused(self, content):
        with pytest.raises(DamagedError):
            flight.unpack(content)

    def test_report_tells_the_story(self, run_directory, capsys):
        assert main(["report", str(run_directory), "--last", "2"]) == 0
        text = capsys.readouterr().out
        assert "hang: process 0 hangs" in text and "process 1, step 3" not in text
        assert "posted SEND_F0.0 to process 1, tag 2, 100 bytes" in text and "begins step 3" not in text

    def test_report_prints_json(self, run_directory, capsys):
        assert main(["report", str(run_directory), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found) == {"status", "events", "flight"}
        assert set(found["flight"]) == {"folder", "cause", "processes", "graph", "entries"}
        assert set(found["flight"]["entries"][0]) == {"before_s", "process", "text", "seconds", "step", "epoch"}

    @pytest.mark.parametrize("arguments", [["nowhere"], [".", "--flight", "x"], [".", "--last", "0"]])
    def test_report_refuses_what_is_not_there(self, run_directory, arguments, monkeypatch, capsys):
        monkeypatch.chdir(run_directory)
        assert main(["report", *arguments]) == ExitCode.USAGE
        assert capsys.readouterr().err.startswith("hpcpipe: error: ")


def test_showing_costs_next_to_nothing(file, beacon):
    """About 60 calls a step, of a step of 45 ms, are to cost less than 0.3 %."""
    beacon.phase(Phase.TRAIN)
    number, best = 2000, 1.0
    for _ in range(5):
        start_s = time.perf_counter()
        for _ in range(number):
            beacon.begin(Kind.F, 1, 2)
            beacon.posted("SEND", RECEIVE, 1, 2, 3)
            beacon.nap("RECV", RECEIVE, 1, 2, str)
            beacon.waited("RECV", RECEIVE, 1, 2, start_s)
            beacon.end()
        best = min(best, (time.perf_counter() - start_s) / (5 * number))
    assert best * 60 < 0.003 * 0.045, f"{best * 1e6:.2f} us per call"


def test_the_room_needs_no_mpi_and_no_numpy():
    modules = {path.stem for path in Path(start.__file__).parent.glob("*.py")}
    assert modules >= {"beacon", "supervisor", "verdict"}
    for path in Path(start.__file__).parent.glob("*.py"):
        assert "import numpy" not in path.read_text() and "mpi4py" not in path.read_text()
