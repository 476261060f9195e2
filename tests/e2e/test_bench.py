"""`hpcpipe bench` on ranks, with real messages."""

import json
from pathlib import Path

import pytest
from support.commands import run

from hpcpipe.errors import ExitCode
from hpcpipe.schedule.build import build

SHORT = ("--repetitions", 2, "--microbatches", 4)


def test_ranks_measure_together_and_one_speaks(tmp_path: Path) -> None:
    finished = run(["launch", "-n", 2, "bench", "actions", *SHORT, "--json"], tmp_path / "output", limit_s=60)
    assert finished.code == ExitCode.DONE, finished.stderr
    assert finished.stderr == ""
    found = json.loads(finished.stdout)
    assert (found["transport"], found["ranks"]) == ("mpi", 2)
    for row in found["schedules"]:
        schedule = build(row["schedule"], 2, 4)
        assert row["actions"] == sum(map(len, schedule.actions))
        assert row["action_us"] > 0
        assert {"RECV_F", "SEND_B", "poll"} <= set(row["kinds"])


def test_the_table_is_plain_where_no_terminal_shows_it(tmp_path: Path) -> None:
    words = ["launch", "-n", 2, "bench", "actions", *SHORT, "--schedule", "gpipe"]
    finished = run(words, tmp_path / "output", limit_s=60)
    assert finished.code == ExitCode.DONE
    assert "with MPI messages" in finished.stdout and "\x1b" not in finished.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["actions", "--ranks", 3], "--ranks 3, but 2 ranks were started"),
        (["actions", "--repetitions", 0], "at least 1"),
        (["actions", "--sched", "gpipe"], "--schedule"),
        (["gemm"], "it measures one process; run `hpcpipe bench gemm` by itself"),
    ],
)
def test_a_mistake_is_told_once(tmp_path: Path, words: list[object], told: str) -> None:
    finished = run(["launch", "-n", 2, "bench", *words], tmp_path / "output", limit_s=60)
    assert finished.code == ExitCode.USAGE
    assert len(finished.messages) == 1 and told in finished.messages[0]
    assert finished.stdout == ""
