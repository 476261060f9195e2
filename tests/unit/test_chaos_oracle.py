"""The oracle of the fault matrix: a run that is as it should be passes, and whatever is wrong with one is seen."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints

from hpcpipe.chaos.digest import checkpoint_digests, state_digest
from hpcpipe.chaos.oracle import Reference, judge_bits, judge_end
from hpcpipe.chaos.row import Event, Expected, Repetition, Row
from hpcpipe.chaos.rows import ROWS, choose
from hpcpipe.chaos.runner import Result
from hpcpipe.chaos.running import Process, Running
from hpcpipe.chaos.seen import Seen
from hpcpipe.cli.chaos_table import summary
from hpcpipe.errors import DamagedError, UsageError
from hpcpipe.faults.parse import parse

RECOVERED = Event("recovered", cause="process 2", max_lost_steps=1, max_s=2.0)
LIMIT_S = 60.0


def metrics() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 5 - step / 7, "grad_norm": 1 + step / 3, "step_s": time.perf_counter()}
        for step in (1, 2, 3, 4)
    ]
    return [*rows, {"step": 4, "val_loss": 3.25, "bits_per_byte": 4.5}]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(directory: Path, num_writers: int) -> Seen:
    """Make what a run leaves that has recovered once: checkpoints of steps 2 and 4, metrics, status, events."""
    directory.mkdir(parents=True)
    for step in (2, 4):
        checkpoints.make_checkpoint(directory / "checkpoints", step, num_writers)
    write_lines(directory / "metrics.jsonl", metrics())
    cause = "process 2 died"
    write_lines(
        directory / "events.jsonl",
        [{"event": "started"}, {"event": "recovered", "cause": cause, "seconds": 0.05, "lost_steps": 1}],
    )
    (directory / "status.json").write_text(json.dumps({"state": "done", "exit_code": 0}))
    return Seen(directory, 0, 3.0, output="hpcpipe: rank 2 was\n lost")


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    return Reference.of(make_run(tmp_path / "reference", 1))


@pytest.fixture
def seen(tmp_path: Path) -> Seen:
    return make_run(tmp_path / "run", 3)


@pytest.fixture
def expected() -> Expected:
    return Expected(
        "a spare takes over", events=(RECOVERED,), absent=("hang",), told=("Rank 2 was lost",), max_end_s=5.0
    )


def judge(seen: Seen, expected: Expected, reference: Reference) -> list[str]:
    return judge_end(seen, expected, LIMIT_S) + judge_bits(seen, reference)


def test_a_good_run_is_good(seen: Seen, expected: Expected, reference: Reference) -> None:
    assert judge(seen, expected, reference) == []


def test_a_digest_does_not_depend_on_the_grid(tmp_path: Path) -> None:
    paths = [checkpoints.make_checkpoint(tmp_path / str(number), 7, number)[0] for number in (1, 2, 5)]
    assert len({state_digest(path) for path in paths}) == 1


@pytest.mark.parametrize("change", ["bit", "name", "shape"])
def test_a_digest_sees_every_change(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_digest(checkpoints.make_checkpoint(tmp_path / "before", 7, 2)[0])
    tensors = checkpoints.make_tensors()
    (name, kind), data = next(item for item in tensors.items() if item[0][1] == "moment2" and item[1].size > 9)
    del tensors[name, kind]
    if change == "bit":
        data.reshape(-1).view(np.uint32)[3] ^= 1
    elif change == "shape":
        data = data.reshape(data.shape[::-1])
        for other in ("weight", "moment1"):
            tensors[name, other] = tensors[name, other].reshape(data.shape)
    else:
        tensors["layers/004/attention/qkv/bias", "weight"] = data
        name = "embedding/other/weight"
    tensors[name, kind] = data
    monkeypatch.setattr(checkpoints, "make_tensors", lambda: tensors)
    assert state_digest(checkpoints.make_checkpoint(tmp_path / "after", 7, 2)[0]) != before


def test_a_damaged_checkpoint_has_no_digest(seen: Seen) -> None:
    file = next((seen.directory / "checkpoints" / "step-00000002").glob("rank-*.h5"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    with pytest.raises(DamagedError):
        checkpoint_digests(seen.directory)


def alter_state(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Seen:
    tensors = checkpoints.make_tensors()
    tensors["embedding/token/weight", "weight"][1, 1] += 1
    monkeypatch.setattr(checkpoints, "make_tensors", lambda: tensors)
    shutil.rmtree(seen.directory / "checkpoints" / "step-00000004")
    checkpoints.make_checkpoint(seen.directory / "checkpoints", 4, 3)
    return seen


def damage(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Seen:
    (seen.directory / "checkpoints" / "step-00000002" / "rank-0001.h5").write_bytes(b"")
    return seen


def lose_last(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Seen:
    shutil.rmtree(seen.directory / "checkpoints" / "step-00000004")
    return seen


def with_rows(rows: list[dict[str, Any]], name: str = "metrics.jsonl") -> Any:
    def change(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Seen:
        write_lines(seen.directory / name, rows)
        return seen

    return change


def with_recovery(**facts: Any) -> Any:
    row = {"event": "recovered", "cause": "process 2 died", "seconds": 0.05, "lost_steps": 1}
    return with_rows([{key: value for key, value in {**row, **facts}.items() if value is not None}], "events.jsonl")


def with_facts(**facts: Any) -> Any:
    return lambda seen, monkeypatch: replace(seen, **facts)


def with_status(**facts: Any) -> Any:
    def change(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Seen:
        (seen.directory / "status.json").write_text(json.dumps({"state": "done", "exit_code": 0, **facts}))
        return seen

    return change


LATER_LOSS = [{**row, "loss": row["loss"] * (1 + 2**-52)} if row.get("step") == 3 else row for row in metrics()]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (alter_state, "after step 4 are others"),
        (damage, "rank-0001.h5"),
        (lose_last, "no checkpoint of step 4"),
        (with_rows(metrics()[:2] + metrics()[3:]), "line 3: another row"),
        (with_rows([*metrics()[:3], *metrics()[2:]]), "line 4: a row twice"),
        (with_rows(metrics()[:-1]), "4 rows, not 5"),
        (with_rows(LATER_LOSS), "line 3: another row"),
        (with_recovery(cause="rank 7 hangs"), "names 'process 2' as its cause"),
        (with_recovery(event="started"), "0 events 'recovered'"),
        (with_recovery(lost_steps=2), "says lost_steps 2"),
        (with_recovery(seconds=2.5), "says seconds 2.5"),
        (with_recovery(seconds=None), "says seconds None"),
        (with_rows([{"event": "hang"}], "events.jsonl"), "there is an event 'hang'"),
        (with_facts(code=None), "did not end within 60 s"),
        (with_facts(code=71), "exit code 71, not 0"),
        (with_facts(end_s=6.0), "more than 5 s"),
        (with_facts(output="hpcpipe: nothing"), "does not say 'Rank 2 was lost'"),
        (with_facts(stray=[Process(9, "python", 2, "S")]), "a rank is left (process 9, S)"),
        (with_facts(shared=[Path("/dev/shm/left")]), "/dev/shm/left is left"),
        (with_facts(problems=["SIGKILL to mpirun was not done"]), "SIGKILL to mpirun was not done"),
        (with_status(exit_code=71), "status.json says exit_code 71"),
        (with_status(state="running"), "status.json says state 'running'"),
    ],
)
def test_what_is_wrong_is_seen(
    change: Any, problem: str, seen: Seen, expected: Expected, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = judge(change(seen, monkeypatch), expected, reference)
    assert any(problem in sentence for sentence in problems), problems


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    code = """
import mmap, os, subprocess, sys, time
path = f"/dev/shm/hpcpipe-test-{os.getpid()}"
file = open(path, "w+b")
file.truncate(4096)
memory = mmap.mmap(file.fileno(), 4096)
variables = {**os.environ, "OMPI_COMM_WORLD_RANK": "2"}
wait = [sys.executable, "-c", "import time; time.sleep(60)"]
subprocess.Popen(wait, env=variables, start_new_session=True)
subprocess.Popen(wait, env={})
print(path, flush=True)
time.sleep(60)
"""
    made = Running([sys.executable, "-c", code], tmp_path, {})
    try:
        yield made
    finally:
        made.kill()


def wait_for_line(running: Running) -> str:
    while not running.output.endswith("\n"):
        assert running.elapsed_s < 20
        time.sleep(0.02)
    return running.output.strip()


def test_processes_and_shared_memory_are_found(running: Running) -> None:
    path = Path(wait_for_line(running))
    try:
        while len(running.processes()) < 2:
            time.sleep(0.02)
        assert sorted(process.kind for process in running.processes()) == ["other", "rank"]
        child = running.find("process 2")
        assert child != running.process.pid
        running.look()
        assert path in running.shared
        with pytest.raises(LookupError, match="no writer 2"):
            running.find("writer 2")
        running.signal("launch", signal.SIGKILL)
        running.process.wait(5)
        (stray,) = running.wait_until_alone(0.3)
        assert (stray.pid, stray.number) == (child, 2)
        os.kill(child, signal.SIGKILL)
        assert running.wait_until_alone(5) == []
    finally:
        path.unlink()


def test_other_commands_are_not_touched(running: Running, tmp_path: Path) -> None:
    wait_for_line(running)
    (tmp_path / "other").mkdir()
    other = Running([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "other", {})
    running.kill()
    assert other.process.poll() is None
    other.kill()
    assert other.process.returncode == -signal.SIGKILL
    Path(running.output.strip()).unlink()


def test_every_row_can_be_injected() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        for index in range(5):
            repetition = Repetition.of(row, index, 4)
            assert repetition.microbatch < 4 // row.data
            for fault in (*parse(repetition.fill(row.inject)), *parse(repetition.fill(row.twin))):
                assert fault.process is None or fault.process < row.pipeline * row.data + row.spares
        assert row.inject or row.acts or row.before or row.is_slow


def test_repetitions_differ_and_can_be_repeated() -> None:
    row = next(row for row in ROWS if row.name == "1")
    made = [Repetition.of(row, index, 4) for index in range(20)]
    assert len({(each.step, each.microbatch) for each in made}) > 8
    assert made == [Repetition.of(row, index, 4) for index in range(20)]


def test_rows_are_chosen() -> None:
    assert {row.name for row in choose(["5.after", "43"])} == {"5.after", "43.later", "43.earlier", "43.other"}
    assert all(not row.is_slow for row in choose([]))
    assert [row.name for row in choose(["12"])] == ["12"]
    with pytest.raises(UsageError, match=r"--rows 5.aftr: no such row; did you mean 5.after\?"):
        choose(["5.aftr"])


def test_one_bad_repetition_is_a_bad_row() -> None:
    row = Row("1", "a", "b", Expected("c"))
    good, bad = (Result(row, 0, "", problems, [0.1], 1.0, None) for problems in ([], ["no"]))
    assert summary([good, good])["ok"]
    assert not summary([good, bad])["ok"]
    assert [entry["ok"] for entry in summary([good, bad])["rows"][0]["repetitions"]] == [True, False]


def test_a_bad_row_is_a_usage_error(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hpcpipe", "chaos", "--rows", "99", "--dir", str(tmp_path / "made")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 64
    assert "--rows 99: no such row" in ended.stderr
    assert not (tmp_path / "made").exists()
