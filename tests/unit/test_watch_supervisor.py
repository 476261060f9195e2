"""The supervisor of a node, with processes that show what they do like ranks, and hang."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from support.fake_rank import GAVE_UP

from hpcpipe.cluster.environment import LAUNCH_ID
from hpcpipe.watch import flight
from hpcpipe.watch.memory import SHARED_MEMORY, MemoryFile

HANG_S = 1.0
LIMIT_S = 20.0


class Ranks:
    """Fake ranks of one launch on this node."""

    def __init__(self, directory: Path, *roles: str, hang_s: float = HANG_S) -> None:
        self.directory = directory
        self.launch_id = f"test-{uuid.uuid4().hex[:12]}"
        self.processes = []
        for number, role in enumerate(roles):
            environ = {
                **os.environ,
                LAUNCH_ID: self.launch_id,
                "OMPI_COMM_WORLD_RANK": str(number),
                "OMPI_COMM_WORLD_SIZE": str(len(roles)),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
                "OMPI_COMM_WORLD_LOCAL_SIZE": str(len(roles)),
            }
            command = [sys.executable, "-m", "support.fake_rank", role, str(directory), str(hang_s)]
            self.processes.append(
                subprocess.Popen(
                    command, env=environ, cwd=Path(__file__).parents[1], text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        for process in self.processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()

    @property
    def files(self) -> list[Path]:
        return list(SHARED_MEMORY.glob(f"hpcpipe-{self.launch_id}-*"))

    @property
    def supervisor(self) -> int:
        """The supervisor's pid, once there is one."""
        memory = MemoryFile(self.files[0], 0)
        try:
            return self.wait_for(lambda: memory.supervisor()[0])
        finally:
            memory.close()

    def events(self, kind: str) -> list[dict]:
        path = self.directory / "events.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["event"] == kind]

    def wait_for(self, what, limit_s: float = LIMIT_S):
        deadline = time.monotonic() + limit_s
        while not (found := what()):
            assert time.monotonic() < deadline, "this did not happen"
            time.sleep(0.02)
        return found

    def close(self) -> None:
        """End what still runs, and see that nothing is left."""
        for process in self.processes:
            process.kill()
            process.communicate()
        self.wait_for(lambda: not self.files)


@pytest.fixture
def ranks(tmp_path):
    started = []

    def start(*roles, **options):
        started.append(Ranks(tmp_path, *roles, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_a_rank_that_spins_with_the_lock_held_is_killed_alone(ranks, tmp_path):
    run = ranks("wait:1:5", "spin", "wait:1:5")
    (event,) = run.wait_for(lambda: run.events("hang"))
    assert (event["rank"], event["step"], event["action"], event["stage"], event["microbatch"]) == (
        1,
        7,
        "killed",
        2,
        1,
    )
    assert HANG_S <= event["seconds"] < 4 * HANG_S
    run.wait_for(lambda: run.processes[1].poll() is not None)
    assert run.processes[1].returncode == -signal.SIGKILL
    assert run.processes[0].poll() is None and run.processes[2].poll() is None
    stacks = run.wait_for(lambda: list(tmp_path.glob("stacks/*/rank-0001.txt")))
    assert "in main" in stacks[0].read_text() and "fake_rank.py" in stacks[0].read_text()
    # One of the others prints it.
    run.processes[0].kill()
    assert "hang: process 1 (rank 1) has not moved" in run.processes[0].communicate()[1]


def test_a_suspended_rank_is_killed_and_one_that_was_only_held_up_is_not(ranks, tmp_path):
    run = ranks("work", "work", "work", hang_s=2.0)
    run.processes[2].send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    run.processes[2].send_signal(signal.SIGCONT)
    (event,) = run.wait_for(lambda: run.events("straggler"))
    assert event["rank"] == 2 and 0.4 <= event["seconds"] < 2.0 and event["why"] == "suspended"
    run.processes[1].send_signal(signal.SIGSTOP)
    (event,) = run.wait_for(lambda: run.events("hang"))
    assert event["rank"] == 1 and "suspended" in event["cause"]
    run.wait_for(lambda: run.processes[1].poll() is not None)
    assert [process.poll() for process in run.processes] == [None, -signal.SIGKILL, None]
    answer = run.wait_for(lambda: list(tmp_path.glob("stacks/*/rank-0001.txt")))[0].read_text()
    assert "did not answer" in answer


def test_ranks_that_are_all_suspended_are_left_alone(ranks):
    run = ranks("work", "work")
    for process in run.processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(3 * HANG_S)
    for process in run.processes:
        process.send_signal(signal.SIGCONT)
    time.sleep(1.0)
    assert [process.poll() for process in run.processes] == [None, None]
    assert run.events("hang") == []


def test_ranks_that_wait_for_each_other_recover_twice_and_then_give_up(ranks, tmp_path):
    run = ranks("wait:1:5", "wait:0:999")
    told = [process.communicate(timeout=LIMIT_S) for process in run.processes]
    assert [process.returncode for process in run.processes] == [GAVE_UP, GAVE_UP]
    events = run.events("deadlock")
    assert [event["action"] for event in events] == ["reset", "reset", "give up"]
    assert [event["count"] for event in events] == [1, 2, 3]
    for out, _ in told:
        assert out.count("reset ") == 2 and "gave up: " in out
        assert "cycle: process 0 -> 1 -> 0" in out
        assert "process 1 is at fault: it posted RECV_F1.0 with tag 999, before with 5" in out
    assert "deadlock: all ranks wait for each other in step 9" in told[0][1]
    run.wait_for(lambda: not run.files)
    flights, cause = flight.load(flight.list_flights(tmp_path)[-1])
    assert sorted(flights) == [0, 1] and cause["what"] in ("failed", "deadlock")


def test_a_rank_without_deadline_may_take_as_long_as_it_likes(ranks):
    run = ranks("wait:1:5", "spin", hang_s=0.0)
    time.sleep(2.0)
    assert [process.poll() for process in run.processes] == [None, None]


def test_the_flight_recorder_survives_the_rank(ranks, tmp_path):
    run = ranks("work", "work")
    run.processes[0].kill()
    (event,) = run.wait_for(lambda: run.events("process lost"))
    assert event["rank"] == 0 and event["step"] >= 7
    folder = run.wait_for(lambda: flight.list_flights(tmp_path))[0]
    run.wait_for(lambda: (folder / "cause.json").exists())
    flights, _ = flight.load(folder)
    assert sorted(flights) == [0, 1]
    assert flights[0].records[-1].step == event["step"]
    steps = [record.step for record in flights[0].records if record.kind == "F"]
    assert steps == list(range(1, len(steps) + 1))


def test_nothing_is_left_when_the_ranks_end(ranks):
    run = ranks("work:20", "work:30")
    supervisor = run.supervisor
    assert [process.wait(LIMIT_S) for process in run.processes] == [0, 0]
    run.wait_for(lambda: not run.files, 2.0)
    run.wait_for(lambda: not Path(f"/proc/{supervisor}").exists(), 2.0)
    assert run.events("process lost") == [] and run.events("hang") == []


def test_a_supervisor_that_was_killed_is_replaced(ranks):
    run = ranks("work", "wait:0:5")
    first = run.supervisor
    os.kill(first, signal.SIGKILL)
    run.wait_for(lambda: run.supervisor != first)
    # And the one that replaces it does its work.
    run.processes[0].send_signal(signal.SIGSTOP)
    run.wait_for(lambda: run.events("hang"))


def test_nothing_is_written_to_a_directory_that_another_run_has_taken_over(ranks, tmp_path):
    run = ranks("work", "spin")
    (tmp_path / "lock.json").write_text('{"fence": "theirs"}')
    run.wait_for(lambda: run.processes[1].poll() is not None)
    time.sleep(0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock.json"]


def test_a_supervisor_costs_next_to_nothing(ranks):
    run = ranks("work", "work", "work", "work")
    ticks = os.sysconf("SC_CLK_TCK")

    def used_s() -> float:
        words = Path(f"/proc/{run.supervisor}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / ticks

    before = used_s()
    time.sleep(5.0)
    assert used_s() - before <= 0.03
