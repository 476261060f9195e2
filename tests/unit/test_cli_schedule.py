"""The command ``hpcpipe schedule``."""

import json
import os
import re
import resource
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from hpcpipe.cli.main import main
from hpcpipe.errors import ExitCode
from hpcpipe.schedule.build import GENERATORS, build
from hpcpipe.schedule.csv_file import read_csv

SMALL = ("--ranks", "4", "--microbatches", "8")


@pytest.fixture
def call(capsys, monkeypatch):
    for variable in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(variable, raising=False)

    def run(*words):
        code = main(["schedule", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_simulate_prints_what_people_script_against(call):
    code, out, _ = call("simulate", "1f1b", *SMALL, "--json")
    found = json.loads(out)
    assert code == ExitCode.DONE
    assert (found["makespan"], found["bubble"], found["max_in_flight"]) == (33, 9, 1)
    assert found["peak_stash"] == [4, 3, 2, 1]
    assert found["bubble_fraction"] == pytest.approx(9 / 33)
    assert found["fill_and_drain"] == [0, 3, 6, 9]
    assert found["waiting"] == [9, 6, 3, 0]
    assert found["busy"] == [24] * 4
    assert (found["num_actions"], found["num_messages"], found["stages"]) == (64, 48, 4)


@pytest.mark.parametrize("name", GENERATORS)
def test_idle_time_is_all_accounted_for(call, name):
    found = json.loads(call("simulate", name, *SMALL, "--json", "--costs", "1,1.3,0.7", "--message", "0.1")[1])
    parts = zip(found["busy"], found["fill_and_drain"], found["waiting"], strict=True)
    assert [sum(part) for part in parts] == pytest.approx([found["makespan"]] * 4)
    assert sum(found["bubble_parts"].values()) == pytest.approx(found["bubble"])
    causes = (found["bubble_parts_per_rank"][cause] for cause in ("schedule", "imbalance", "messages"))
    parts = zip(found["busy"], *causes, strict=True)
    assert [sum(part) for part in parts] == pytest.approx([found["makespan"]] * 4)


def test_costs_chunks_and_messages_reach_the_clock(call):
    def makespan(*words):
        return json.loads(call("simulate", *words, "--json")[1])["makespan"]

    assert makespan("interleaved", *SMALL, "--chunks", 4) == 26.25
    assert makespan("1f1b", *SMALL, "--costs", "2,2,2") == 66
    assert makespan("1f1b", *SMALL, "--costs", "1,0,0") == 11
    assert makespan("1f1b", *SMALL, "--message", "0.5") > 33


def test_greedy_plans_with_costs_and_memory(call):
    def found(*words):
        return json.loads(call("simulate", "greedy", *SMALL, "--json", *words)[1])

    assert found()["bubble"] == 1.5 and found()["stages"] == 8
    assert found("--chunks", 1)["bubble"] == 3
    slow = found("--message", 0.1)
    assert slow["bubble"] < json.loads(call("simulate", "zb-v", *SMALL, "--json", "--message", 0.1)[1])["bubble"]
    small = found("--max-stash", 2)
    assert max(small["peak_stash"]) <= 2 and small["bubble"] > 1.5
    assert call("check", "greedy", *SMALL, "--costs", "1,2,1", "--max-stash", 2.5)[0] == ExitCode.DONE


def test_simulate_prints_a_table_for_people(call):
    out = call("simulate", "zb-h1", *SMALL)[1]
    assert out.startswith("zb-h1: 4 ranks, 4 stages, 8 microbatches\nmakespan 27, bubble 3 (11.1 %), stash at most 4")
    assert "\nbubble by cause: schedule 3, imbalance 0, messages 0\n" in out
    assert re.search(r"^rank 3 +24 +3 +0 +4 +3 +0 +0$", out, re.MULTILINE)
    out = call("simulate", "1f1b", "--ranks", 4, "--microbatches", 16, "--message", 0.1)[1]
    assert "\nbubble by cause: schedule 9, imbalance 0, messages 2.8\n" in out


def test_show_draws_with_letters_where_there_is_no_terminal(call):
    code, out, _ = call("show", "1f1b", *SMALL)
    assert code == ExitCode.DONE
    assert "rank 3  ·········F0 B0    F1 B1    F2 B2" in out
    assert "F forward, B backward, · idle" in out
    assert "\x1b" not in out and "widen" not in out


def test_show_keeps_to_the_width_of_the_terminal(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    out = call("show", "interleaved", *SMALL)[1]
    assert max(len(line) for line in out.splitlines() if line.startswith("rank")) <= 50
    assert "small letters: every second stage of a rank" in out
    assert "cut at time" in out and "--svg" in out


def test_show_paints_where_there_are_colours(call, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = call("show", "zb-v", *SMALL)[1]
    backgrounds = set(re.findall(r"48;2;(\d+;\d+;\d+)m", out))
    assert len(backgrounds) == 7
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert re.search(r"^rank 0  0 +1 +2 +3 +4 +5 +6 +0 +0 +0 +1", plain, re.MULTILINE)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "F0" in call("show", "zb-v", *SMALL)[1]


def test_show_lists_actions_with_messages_or_without(call):
    out = call("show", "1f1b", "--ranks", 2, "--microbatches", 2, "--actions")[1]
    assert "rank 0  F0.0 F0.1 B0.0 B0.1\nrank 1  F1.0 B1.0 F1.1 B1.1\n" in out
    out = call("show", "1f1b", "--ranks", 2, "--microbatches", 2, "--actions", "--messages")[1]
    assert "rank 1  RECV_F1.0 RECV_F1.1 F1.0 B1.0 SEND_B1.0 F1.1 B1.1 SEND_B1.1" in out


def test_show_prints_one_json_object(call):
    found = json.loads(call("show", "zb-v", "--ranks", 2, "--microbatches", 2, "--json")[1])
    assert found["stage_to_rank"] == [0, 1, 1, 0]
    assert found["actions"][0][:4] == ["F0.0", "F0.1", "F3.0", "I3.0"]
    assert found["num_actions"] == sum(map(len, found["actions"]))


def test_check_says_what_holds(call):
    code, out, _ = call("check", "dualpipe-v", *SMALL)
    assert code == ExitCode.DONE
    assert "ok, 146 actions, 96 messages" in out
    assert out.count("  holds: ") == 6 and "no deadlock" in out
    found = json.loads(call("check", "dualpipe-v", *SMALL, "--json")[1])
    assert found["ok"] is True and found["problems"] == [] and len(found["rules"]) == 6
    assert found["num_messages"] == 96


def test_check_says_as_json_why_a_schedule_is_refused(call, tmp_path):
    file, copy = tmp_path / "mine.csv", tmp_path / "copy.csv"
    call("check", "zb-h1", *SMALL, "--csv", file)
    file.write_text(file.read_text().replace("W3.0,F3.4", "W3.0"))
    for words, problem in (
        ((file,), f"{file}: rank 3, the end of its list: F3.4 is missing"),
        (("zb-h1", *SMALL, "--max-stash", 3), "the stash grows to 4 activations, and the limit is 3"),
        (("looped-bfs", *SMALL, "--max-in-flight", 3), "too many messages are in flight"),
        (("interleaved", "--ranks", 4, "--microbatches", 13), "parallel.microbatches = 12 or 15"),
        (("1f2b", *SMALL), "there is no schedule '1f2b'"),
    ):
        code, out, err = call("check", *words, "--json", "--csv", copy)
        found = json.loads(out)
        assert (code, err, copy.exists()) == (ExitCode.USAGE, "", False)
        assert found.keys() == {"schedule", "ok", "problems"}
        assert found["schedule"] == str(words[0]) and found["ok"] is False
        assert len(found["problems"]) == 1 and problem in found["problems"][0]
        code, out, err = call("check", *words)
        assert (code, out, err) == (ExitCode.USAGE, "", f"hpcpipe: error: {found['problems'][0]}\n")


@pytest.mark.parametrize("words", [("1f1b",), ("nowhere.csv",), ("1f1b", *SMALL, "--max-in-flight", -1)])
def test_a_wrong_command_line_is_no_refused_schedule(call, words):
    code, out, err = call("check", *words, "--json")
    assert (code, out) == (ExitCode.USAGE, "") and err.startswith("hpcpipe: error: ")


def test_check_holds_schedules_to_limits(call, tmp_path):
    file = tmp_path / "zb-h1.csv"
    call("check", "zb-h1", *SMALL, "--csv", file)
    for words in (("zb-h1", *SMALL), (file,)):
        out = call("check", *words, "--max-stash", 4, "--max-in-flight", 1)[1]
        assert "holds: no rank stashes more than 4 activations" in out
        assert "holds: no rank has more than 1 messages in flight where F = I = W" in out
        code, _, err = call("check", *words, "--max-stash", 3)
        assert code == ExitCode.USAGE
        assert re.search(r"rank 0, position \d+, F0.3: the stash grows to 4 activations, and the limit is 3", err)
    code, _, err = call("check", "looped-bfs", *SMALL, "--max-in-flight", 3)
    assert code == ExitCode.USAGE
    assert re.search(
        r"rank \d, position \d+, SEND_\S+: too many messages are in flight: 4 at most where F = I = W", err
    )


def test_a_file_can_be_written_edited_and_read(call, tmp_path):
    file = tmp_path / "mine.csv"
    call("check", "zb-h1", *SMALL, "--csv", file)
    assert read_csv(file.read_text(), "zb-h1").actions[0][0] == build("zb-h1", 4, 8).actions[0][0]
    assert "SEND" not in file.read_text()
    assert json.loads(call("simulate", file, "--json")[1])["makespan"] == 27

    file.write_text(file.read_text().replace("W3.0,F3.4", "F3.4,W3.0"))
    assert "ok" in call("check", file, *SMALL)[1]
    file.write_text(file.read_text().replace("F3.4,W3.0", "W3.0"))
    code, out, err = call("check", file)
    assert (code, out) == (ExitCode.USAGE, "")
    assert "mine.csv: rank 3, the end of its list: F3.4 is missing" in err


def test_a_file_with_messages_reads_back_too(call, tmp_path):
    file = tmp_path / "full.csv"
    call("check", "zb-v", *SMALL, "--csv", file, "--messages")
    assert "SEND_F0.0" in file.read_text()
    assert call("check", file)[0] == ExitCode.DONE


def test_svg_is_written(call, tmp_path):
    for action in ("show", "simulate"):
        file = tmp_path / f"{action}.svg"
        assert call(action, "v-half", *SMALL, "--svg", file)[0] == ExitCode.DONE
        assert ElementTree.parse(file).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("show", "1f2b", *SMALL), "no schedule '1f2b': choose one of gpipe"),
        (("show", "1f1b", "--ranks", "2"), "1f1b needs --microbatches; only a .csv file has its own"),
        (("show", "1f1b"), "needs --ranks and --microbatches"),
        (("show", "1f1b", "--ranks", "0", "--microbatches", "2"), "at least 1 rank"),
        (("show", "1f1b", "--ranks", "two", "--microbatches", "2"), "invalid int value: 'two'"),
        (("check", "interleaved", "--ranks", "4", "--microbatches", "13"), "parallel.microbatches = 12 or 15"),
        (("check", "zb-v", *SMALL, "--chunks", "3"), "2 stages per rank, not 3"),
        (("check", "nowhere.csv"), "cannot read nowhere.csv: No such file"),
        (("simulate", "1f1b", *SMALL, "--costs", "1,2"), "--costs 1,2: give three times"),
        (("simulate", "1f1b", *SMALL, "--costs", "1,x,2"), "--costs 1,x,2: give three times"),
        (("simulate", "1f1b", *SMALL, "--costs", "0,1,1"), "give three times"),
        (("simulate", "1f1b", *SMALL, "--costs=-1,1,1"), "give three times"),
        (("simulate", "1f1b", *SMALL, "--costs", "nan,1,1"), "give three times"),
        (("simulate", "1f1b", *SMALL, "--message=-1"), "--message -1.0: give the time"),
        (("simulate", "1f1b", *SMALL, "--message", "inf"), "--message inf: give the time"),
        (
            ("show", "greedy", *SMALL, "--max-stash", "0.5"),
            "rank 0 may stash 0.5 activations, and cannot run with less",
        ),
        (("simulate", "1f1b", *SMALL, "--max-stash", "-1"), "--max-stash -1: give a number of activations above 0"),
        (("check", "1f1b", *SMALL, "--max-in-flight", "x"), "invalid int value: 'x'"),
        (
            ("check", "1f1b", *SMALL, "--max-in-flight", "-1"),
            "--max-in-flight -1: give a number of messages, 0 or more",
        ),
        (("show", "1f1b", *SMALL, "--svg", "no/such/place.svg"), "cannot write no/such/place.svg: No such file"),
        (("show", "1f1b", *SMALL, "--csv", "no/such/place.csv"), "cannot write no/such/place.csv"),
        (("show", "1f1b", *SMALL, "--action"), "did you mean --actions?"),
        (("draw", "1f1b"), "choose from"),
    ],
)
def test_mistakes_are_named(call, words, complaint):
    code, out, err = call(*words)
    assert (code, out) == (ExitCode.USAGE, "")
    assert complaint in err and err.startswith("hpcpipe: error: ")


def test_numbers_beside_a_file_must_be_its_own(call, tmp_path):
    file = tmp_path / "v.csv"
    call("check", "zb-v", *SMALL, "--csv", file)
    assert call("check", file, *SMALL, "--chunks", 2)[0] == ExitCode.DONE
    for option, number, own in (("--ranks", 3, 4), ("--microbatches", 9, 8), ("--chunks", 1, 2)):
        code, _, err = call("check", file, option, number)
        assert code == ExitCode.USAGE
        assert f"{option} {number}, but {file} has {own}" in err


def test_a_file_that_is_no_text_is_named(call, tmp_path):
    file = tmp_path / "bytes.csv"
    file.write_bytes(b"0F0,\xff\xfe")
    assert "is not a text file: byte 4 is not UTF-8" in call("check", file)[2]


def test_show_takes_under_half_a_second_and_needs_no_mpi_and_no_numba():
    command = [sys.executable, "-X", "importtime", "-m", "hpcpipe", "schedule", "show", "1f1b", *SMALL]

    def processor_time_s():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=os.environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "rank 3" in done.stdout
        assert not re.search(r"\| +(mpi4py|numba|h5py|scipy)", done.stderr)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(processor_time_s() for _ in range(5)) < 0.5


@pytest.mark.parametrize("words", [("--costs", "1e308,1e308,1e308"), ("--message", "1e308")])
@pytest.mark.parametrize("name", ["greedy", "1f1b"])
def test_times_that_do_not_add_up_are_refused(call, name, words):
    code, _, err = call("simulate", name, *SMALL, *words)
    assert code == ExitCode.USAGE and "too large to add up" in err
