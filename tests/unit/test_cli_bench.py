"""The command ``hpcpipe bench``."""

import json

import pytest

from hpcpipe.cli.main import main
from hpcpipe.errors import ExitCode
from hpcpipe.schedule.build import build

SHORT = ("--repetitions", "2", "--microbatches", "4")


@pytest.fixture
def call(capsys, monkeypatch):
    for variable in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)

    def run(*words):
        code = main(["bench", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_json_has_the_keys_that_people_script_against(call):
    code, out, _ = call("actions", *SHORT, "--ranks", "3", "--schedule", "zb-h1", "--schedule", "gpipe", "--json")
    found = json.loads(out)
    assert code == ExitCode.DONE
    rows = found.pop("schedules")
    assert found == {"benchmark": "actions", "transport": "none", "ranks": 3, "microbatches": 4, "repetitions": 2}
    assert [row["schedule"] for row in rows] == ["zb-h1", "gpipe"]
    for row in rows:
        schedule = build(row["schedule"], 3, 4)
        assert row["stages"] == 3
        assert row["actions"] == sum(map(len, schedule.actions))
        assert 0 < row["p10_us"] <= row["action_us"] <= row["p90_us"] < 10_000
        kinds = {action.kind for actions in schedule.actions for action in actions}
        assert set(row["kinds"]) == {*kinds, "poll"}
        assert min(row["kinds"].values()) > 0


def test_the_table_has_a_row_per_schedule_and_all_columns_in_a_narrow_terminal(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = call("actions", *SHORT)
    assert code == ExitCode.DONE
    head, columns, *rows = out.splitlines()
    assert "4 ranks, 4 microbatches, without messages" in head
    assert columns.split()[:4] == ["schedule", "actions", "us", "10-90"]
    assert {"F", "B", "I", "W", "SEND_F", "RECV_B", "REDUCE", "STEP", "poll"} <= set(columns.split())
    assert [row.split()[0] for row in rows] == ["1f1b", "zb-h1", "interleaved", "zb-v"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("action",), "did you mean actions?"),
        (("actions", "--schedule", "1f2b"), "there is no schedule '1f2b'"),
        (("actions", "--schedule", "dualpipe-v", "--microbatches", "4"), "set parallel.microbatches = 8"),
        (("actions", "--ranks", "0"), "at least 1 rank"),
        (("actions", "--repetitions", "0"), "--repetitions 0: at least 1 is needed"),
    ],
)
def test_mistakes_are_told(call, words, told):
    code, out, err = call(*words)
    assert code == ExitCode.USAGE
    assert out == "" and told in err
