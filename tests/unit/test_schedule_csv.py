"""Schedules in CSV files: round trips, PyTorch's files, and errors that name line and cell."""

import random

import pytest

from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import COMPUTE, Kind
from hpcpipe.schedule.build import GENERATORS, build, generate
from hpcpipe.schedule.csv_file import build_from_csv, read_csv, write_csv

SHAPES = [(1, 2), (2, 4), (3, 6)]
MARK = "# hpcpipe schedule 1"
HEAD = f"{MARK}\n# microbatches: 1\n# stage_to_rank: 0 1\n"


def in_pytorch_form(schedule):
    """Write a schedule as PyTorch writes compute-only schedules: stage, kind, microbatch, and rows of equal length."""
    rows = [[f"{stage}{kind}{k}" for kind, stage, k in actions] for actions in schedule.actions]
    longest = max(map(len, rows))
    idle = [[""] * (rank % 3) for rank in range(len(rows))]
    return "".join(
        ",".join([*gap, *row, *[""] * (longest - len(row))]) + "\r\n" for gap, row in zip(idle, rows, strict=True)
    )


@pytest.mark.parametrize(("p", "m"), SHAPES)
@pytest.mark.parametrize("name", GENERATORS)
def test_what_is_written_reads_back(name, p, m):
    for schedule in (generate(name, p, m), build(name, p, m)):
        text = write_csv(schedule)
        assert read_csv(text, name) == schedule
        assert build_from_csv(text, name) == build(name, p, m)
        assert text.isascii() and text.endswith("\n")
        assert len(text.splitlines()) == 3 + p


@pytest.mark.parametrize(("p", "m"), SHAPES)
@pytest.mark.parametrize("name", GENERATORS)
def test_a_file_of_pytorch_is_read_and_its_placement_inferred(name, p, m):
    assert build_from_csv(in_pytorch_form(generate(name, p, m)), name) == build(name, p, m)


def test_overlapped_actions_run_one_after_the_other():
    text = "0F0,0F1,1F0,(1F1;1B0)OVERLAP_F_B,(0F2;1B1)OVERLAP_F_B,1F2,0B0,1B2,0B1,0B2\n"
    actions = read_csv(text, "v").actions[0]
    assert " ".join(map(str, actions)) == "F0.0 F0.1 F1.0 F1.1 B1.0 F0.2 B1.1 F1.2 B0.0 B1.2 B0.1 B0.2"
    assert build_from_csv(text, "v").num_ranks == 1


def test_idle_cells_quotes_comments_and_byte_order_mark_are_nothing():
    plain = build_from_csv("0F0,0B0\n1F0,1B0\n", "x")
    odd = '\ufeff# by hand\r\n"0F0" , ,,0B0,,\r\n,, 1F0,1B0\r\n\r\n'
    assert build_from_csv(odd, "x") == plain


def test_a_file_with_messages_is_not_lowered_again():
    text = HEAD + "F0.0,SEND_F0.0,RECV_B0.0,B0.0,REDUCE0,STEP0\nRECV_F1.0,F1.0,B1.0,REDUCE1,SEND_B1.0,STEP1\n"
    program = build_from_csv(text, "own")
    assert write_csv(program) == text
    kinds = [Kind.F, Kind.SEND_F, Kind.RECV_B, Kind.B, Kind.REDUCE, Kind.STEP]
    assert [action.kind for action in program.actions[0]] == kinds
    with pytest.raises(UsageError, match=r"RECV_F1\.0 is missing"):
        build_from_csv(text.replace("RECV_F1.0,", ""), "own")
    late = text.replace("SEND_F0.0,RECV_B0.0,B0.0", "RECV_B0.0,B0.0,SEND_F0.0")
    with pytest.raises(UsageError, match="deadlock"):
        build_from_csv(late, "own")
    with pytest.raises(UsageError, match=r"rank 1, .*, STEP1: the update waits for all ranks"):
        build_from_csv(text.replace("SEND_B1.0,STEP1", "STEP1,SEND_B1.0"), "own")
    with pytest.raises(UsageError, match=r"rank 0, .*, REDUCE0: every weight gradient of stage 0 must come first"):
        build_from_csv(text.replace("B0.0,REDUCE0", "REDUCE0,B0.0"), "own")
    with pytest.raises(UsageError, match=r"rank 1, the end of its list: REDUCE1 is missing"):
        build_from_csv(text.replace("REDUCE1,", ""), "own")


def test_a_file_with_messages_but_without_updates_gets_them():
    text = HEAD + "F0.0,SEND_F0.0,RECV_B0.0,B0.0\nRECV_F1.0,F1.0,B1.0,SEND_B1.0\n"
    lists = write_csv(build_from_csv(text, "own")).splitlines()[3:]
    assert lists == ["F0.0,SEND_F0.0,RECV_B0.0,B0.0,REDUCE0,STEP0", "RECV_F1.0,F1.0,B1.0,SEND_B1.0,REDUCE1,STEP1"]


def test_a_declared_microbatch_that_is_missing_is_seen():
    text = write_csv(generate("gpipe", 2, 2))
    shorter = text.replace(",F0.1", "").replace(",B0.1", "").replace(",F1.1", "").replace(",B1.1", "")
    assert build_from_csv(shorter.replace("microbatches: 2", "microbatches: 1"), "cut").num_microbatches == 1
    with pytest.raises(UsageError, match=r"F0\.1 is missing"):
        build_from_csv(shorter, "cut")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no action"),
        (",,\n", "holds no action"),
        ("0F0,0B0\n\n1F0,1B0\n", r"line 2: rank 1 has no action"),
        ("0F0,0X0\n", r"line 1, cell 2, '0X0': there is no kind X: choose from F, B"),
        ("0F0,0F\n", r"line 1, cell 2, '0F': expected an action such as F2\.0 or 2F0"),
        ("0F0,F0.0.1\n", r"cell 2, 'F0\.0\.1': expected an action"),
        ("0F0;0B0\n", r"cell 1, '0F0;0B0': expected an action"),
        ("F0.0,F0\n", r"cell 2, 'F0': expected an action"),
        ("F0.0,STEP0.0\n", r"cell 2, 'STEP0\.0': expected an action"),
        ("0F0,0STEP0\n", r"cell 2, '0STEP0': expected an action"),
        ("(0F0;0Y0)OVERLAP_F_B\n", r"cell 1, '0Y0': there is no kind Y"),
        ("0UNSHARD,0F0,0B0\n", r"cell 1, '0UNSHARD': .* export its compute-only schedule"),
        ("0F0,0B0\n0F0,1B0\n", r"line 2, cell 1, F0\.0: stage 0 cannot be on rank 1: F0\.0 in line 1, cell 1, puts it"),
        ("0F0,0B0\n2F0,2B0\n", r"line 2, cell 1, F2\.0: the file has no action of stage 1"),
        ("0F0,0F999999999,0B0\n", r"1000000000 microbatches through 1 stages need more actions than the 3"),
        ("0F999999999999\n", "expected an action"),
        ("# hpcpipe schedule 2\nF0.0,B0.0\n", r"line 1: expected '# hpcpipe schedule 1', the only version"),
        (f"{MARK}\n# microbatches: 1\nF0.0,B0.0\n", r"has no line '# stage_to_rank: \.\.\.'"),
        (f"{MARK}\n# microbatches: one\n# stage_to_rank: 0\nF0.0\n", r"line 2: expected a whole number, not 'one'"),
        (f"{MARK}\n# microbatches: 99999\n# stage_to_rank: 0\nF0.0\n", "99999 microbatches .* than the 1 of the file"),
        (HEAD + "F0.0,B0.0\n", r"line 3: stage_to_rank is '0 1', but the file has 1 line of actions"),
        (HEAD + "F0.0,B0.0\nF1.0,B0.0\n", r"line 5, cell 2, B0\.0: stage 0 belongs to rank 0, and this is rank 1"),
        (HEAD + "F0.0,B0.0\nF1.0,B1.1\n", r"line 5, cell 2, B1\.1: the file has 2 stages and 1 microbatches"),
        (HEAD + "F0.0,B0.0\nF1.0,B7.0\n", r"line 5, cell 2, B7\.0: the file has 2 stages"),
    ],
)
def test_errors_name_the_line_and_the_cell(text, complaint):
    with pytest.raises(UsageError, match=complaint) as caught:
        read_csv(text, "mine.csv")
    assert str(caught.value).startswith("schedule mine.csv")


def test_a_schedule_that_breaks_a_rule_is_refused_after_reading():
    with pytest.raises(UsageError, match=r"mine\.csv: rank 0, .* ascending microbatch order"):
        build_from_csv("0F0,0F1,0B1,0B0\n", "mine.csv")
    with pytest.raises(UsageError, match=r"mine\.csv: rank 0, .* needs one B, or one I and one W"):
        build_from_csv("0F0,0B0,0W0\n", "mine.csv")


def test_no_damage_to_a_file_is_met_with_anything_but_a_refusal():
    generator = random.Random(11)
    texts = [
        write_csv(build("1f1b", 2, 3)),
        write_csv(generate("zb-v", 2, 3)),
        in_pytorch_form(generate("zb-h1", 3, 3)),
    ]
    refused = 0
    for _ in range(1500):
        text = generator.choice(texts)
        start = generator.randrange(len(text))
        end = min(len(text), start + generator.choice((0, 1, 1, 2, 6, 30)))
        damaged = text[:start] + generator.choice(("", "", "7", "B", ",", "\n", "#", "SEND_F1.1,", "\x00")) + text[end:]
        try:
            program = build_from_csv(damaged, "damaged")
        except UsageError:
            refused += 1
        else:
            assert any(action.kind in COMPUTE for action in program.actions[0])
    assert refused > 1000
