"""What a batch job does next, with stand-ins for Slurm's commands."""

import json
from pathlib import Path

import pytest

from hpcpipe.cli import main as command
from hpcpipe.cluster import batch
from hpcpipe.cluster.batch import Attempts, Verdict
from hpcpipe.errors import DiskError

CONFIG = "[model]\nlayers = 6\n[parallel]\nmicrobatches = 4\n"


@pytest.mark.parametrize(
    ("code", "is_warned", "is_halted", "expected"),
    [
        (0, False, False, (Verdict.END, 0)),
        (64, False, False, (Verdict.END, 64)),
        (65, True, False, (Verdict.END, 65)),
        (70, False, False, (Verdict.END, 70)),
        (73, False, False, (Verdict.END, 73)),
        (74, True, False, (Verdict.END, 74)),
        (75, False, False, (Verdict.REQUEUE, 75)),
        (75, True, False, (Verdict.REQUEUE, 75)),
        (75, True, True, (Verdict.END, 75)),
        (71, False, False, (Verdict.RELAUNCH, 71)),
        (71, True, False, (Verdict.REQUEUE, 71)),
        (137, False, False, (Verdict.RELAUNCH, 71)),
        (1, False, False, (Verdict.END, 1)),
    ],
)
def test_what_follows_each_code(code: int, is_warned: bool, is_halted: bool, expected: tuple[Verdict, int]) -> None:
    assert batch.decide(code, Attempts(idle=1), 3, is_warned, is_halted) == expected


def test_the_second_failure_in_vain_asks_for_other_nodes() -> None:
    verdicts = [batch.decide(71, Attempts(idle=idle), 3, False)[0] for idle in range(4)]
    assert verdicts == [Verdict.RELAUNCH, Verdict.RELAUNCH, Verdict.REQUEUE, Verdict.END]


@pytest.mark.parametrize("code", [71, 75, 137])
def test_the_limit_of_attempts_without_progress(code: int) -> None:
    verdict, job_code = batch.decide(code, Attempts(idle=3), 3, False)
    assert (verdict, job_code) == (Verdict.END, 71 if code == 137 else code)


def test_attempts_are_counted_from_checkpoint_to_checkpoint() -> None:
    attempts = Attempts().begin(10, "7.0")
    assert attempts.is_open and attempts.step == 10 and attempts.idle == 0
    attempts = attempts.after(10)
    assert (attempts.idle, attempts.is_open) == (1, False)
    attempts = attempts.begin(10, "7.1").after(10)
    assert attempts.idle == 2
    attempts = attempts.begin(10, "7.2").after(11)
    assert (attempts.idle, attempts.step) == (0, 11)


def test_an_attempt_that_was_killed_counts_too() -> None:
    killed = Attempts().begin(10, "7.0")
    assert killed.begin(10, "7.1").idle == 1
    assert killed.begin(12, "7.1").idle == 0


def test_lost_nodes_are_those_of_one_allocation() -> None:
    attempts = Attempts(start="7.0", lost=("n2",))
    assert attempts.begin(0, "7.0").lost == ("n2",)
    assert attempts.begin(0, "7.1").lost == ()


def test_attempts_are_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run/job-7.json"
    assert Attempts.read(path) is None
    attempts = Attempts(5, 2, True, "7.1", ("n2", "n4"))
    attempts.write(path)
    assert Attempts.read(path) == attempts
    assert [name.name for name in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x"}', "[" * 100_000])
def test_a_file_that_makes_no_sense_counts_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job-7.json"
    path.write_text(text)
    assert Attempts.read(path) is None


def test_a_job_that_cannot_count_must_not_start_again(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    with pytest.raises(DiskError, match=r"job-7\.json could not be written"):
        Attempts().write(tmp_path / "run/job-7.json")


@pytest.mark.parametrize(
    ("num_nodes", "num_ranks", "per_node", "room", "expected"),
    [
        (2, 4, 2, 8, [2, 2]),
        (3, 4, 2, 8, [2, 2]),
        (3, 4, 2, 2, [2, 2]),
        (3, 5, 2, 2, [2, 2, 1]),
        (1, 4, 2, 8, [4]),
        (2, 7, 2, 4, [4, 3]),
        (1, 4, 2, 3, []),
        (2, 0, 2, 3, []),
        (0, 4, 2, 3, []),
    ],
)
def test_ranks_on_nodes(num_nodes: int, num_ranks: int, per_node: int, room: int, expected: list[int]) -> None:
    nodes = [f"n{index}" for index in range(num_nodes)]
    places = batch.spread(nodes, num_ranks, per_node, room)
    assert list(places.values()) == expected
    assert list(places) == nodes[: len(expected)]


def test_the_same_ranks_if_there_is_room_else_the_most_that_are_valid() -> None:
    asked: list[int] = []

    def is_even(count: int) -> bool:
        asked.append(count)
        return count % 2 == 0

    assert batch.choose_ranks(["n1"], 4, 2, 4, is_even) == {"n1": 4}
    assert asked == []
    assert batch.choose_ranks(["n1", "n3", "n4"], 12, 3, 3, is_even) == {"n1": 3, "n3": 3, "n4": 2}
    assert asked == [9, 8]
    assert batch.choose_ranks(["n1"], 4, 2, 2, lambda count: False) == {}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend to be in a job on n1 to n3; node names in the file ``dead`` do not answer."""
    commands = {
        "scontrol": 'case "$3" in "n[1-3]") echo "n1 n2 n3" ;; *) echo "$3" | tr , " " ;; esac',
        "squeue": f"cat {tmp_path}/current 2>/dev/null || echo 'n[1-3]'",
        "sinfo": f"echo 'n1 mix\nn1 mix\nn2 mix\nn3 mix'; cat {tmp_path}/down 2>/dev/null",
        "srun": f'for node in n1 n2 n3; do grep -qs $node {tmp_path}/dead || echo "answers $node"; done; exit 1',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_CPUS_PER_NODE": "4(x3)",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    (tmp_path / "c.toml").write_text(f'{CONFIG}[run]\ndir = "{tmp_path}"\nname = "run"\n')
    return tmp_path


class Job:
    """A job that asks `hpcpipe batch`."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], *options: str) -> None:
        self.root, self.capsys, self.options = root, capsys, options

    def ask(self, moment: str, *words: str, settings: tuple[str, ...] = ()) -> tuple[int, str, str]:
        """Return the exit code, and what came on both streams."""
        arguments = ["batch", moment, "--job=7", "--ranks=6", "--cpus=1", *self.options, *words, f"{self.root}/c.toml"]
        code = command.main([*arguments, *settings])
        return code, *self.capsys.readouterr()

    def begin(self, *settings: str) -> list[str]:
        """Return the words of the command that would start the ranks."""
        code, told, _ = self.ask("begin", settings=settings)
        assert code == 0
        assert told.endswith("\0")
        return told.split("\0")[:-1]

    def end(self, code: int, *words: str) -> str:
        """Return what the script does next."""
        ended, told, _ = self.ask("end", f"--code={code}", *words)
        assert ended == 0
        return told.strip()

    def checkpoint(self, step: int) -> None:
        """Leave what a complete checkpoint looks like."""
        (self.root / f"run/checkpoints/step-{step:08d}").mkdir(parents=True)


@pytest.fixture
def job(slurm: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(slurm, capsys)


def test_the_first_attempt_is_the_plain_command(job: Job) -> None:
    assert job.begin("--set", "train.steps=9") == [
        "launch", "-n", "6", "train", f"{job.root}/c.toml", "--set", "train.steps=9"
    ]  # fmt: skip
    assert job.end(0) == "end 0"


def test_an_uneven_job_is_left_to_slurm(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "4,1(x2)")
    assert job.begin()[:4] == ["launch", "-n", "6", "train"]


def test_options_of_the_site_come_first(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = Job(slurm, capsys, "--mpirun-arg=--mca", "--mpirun-arg=pml", "--mpirun-arg=ucx").begin()
    assert words[3:6] == ["--mpirun-arg=--mca", "--mpirun-arg=pml", "--mpirun-arg=ucx"]


def test_a_restart_goes_on_even_if_the_first_start_was_to_be_a_new_one(job: Job) -> None:
    assert job.begin("--resume", "never")[-2:] == ["--resume", "never"]
    job.checkpoint(10)
    assert job.end(75) == "requeue 75"
    assert job.begin("--resume", "never")[-4:] == ["--resume", "never", "--resume", "auto"]


def test_a_lost_node_is_left_out(job: Job) -> None:
    job.begin()
    (job.root / "dead").write_text("n2")
    assert job.end(71) == "relaunch 71"
    words = job.begin()
    assert words[:5] == ["launch", "-n", "6", "--mpirun-arg=--host", "--mpirun-arg=n1:3,n3:3"]


def test_fewer_ranks_where_the_other_nodes_have_no_room(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(slurm, capsys, "--cpus=2")
    job.begin()
    (slurm / "dead").write_text("n2")
    assert job.end(71) == "relaunch 71"
    assert job.begin()[2:5] == ["4", "--mpirun-arg=--host", "--mpirun-arg=n1:2,n3:2"]


def test_back_into_the_queue_where_no_number_of_ranks_will_do(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(slurm, capsys, "--cpus=2")
    (slurm / "dead").write_text("n2")
    fixed = ("--set", "parallel.pipeline=6")
    assert job.ask("begin", settings=fixed)[0] == 0
    assert job.ask("end", "--code=71", settings=fixed)[1] == "requeue 71\n"


def test_a_node_that_slurm_has_taken_away_or_knows_to_be_down(job: Job) -> None:
    job.begin()
    (job.root / "current").write_text("n1,n2")
    (job.root / "down").write_text("n2 down*\n")
    assert job.end(71) == "relaunch 71"
    assert json.loads((job.root / "run/job-7.json").read_text())["lost"] == ["n2", "n3"]
    assert job.begin()[2:5] == ["4", "--mpirun-arg=--host", "--mpirun-arg=n1:4"]


def test_all_nodes_answer(job: Job) -> None:
    job.begin()
    assert job.end(137) == "relaunch 71"
    assert job.begin()[:4] == ["launch", "-n", "6", "train"]


def test_a_job_that_slurm_has_warned_asks_no_node(job: Job) -> None:
    job.begin()
    (job.root / "dead").write_text("n1 n2 n3")
    assert job.end(71, "--warned") == "requeue 71"


def test_a_spare_node_takes_the_place_of_a_lost_one(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(slurm, capsys, "--spare-nodes=1")
    assert job.begin()[2:5] == ["4", "--mpirun-arg=--host", "--mpirun-arg=n1:2,n2:2"]
    (slurm / "dead").write_text("n1")
    assert job.end(71) == "relaunch 71"
    assert job.begin()[2:5] == ["4", "--mpirun-arg=--host", "--mpirun-arg=n2:2,n3:2"]


def test_too_many_spare_nodes(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, told = Job(slurm, capsys, "--spare-nodes=3").ask("begin")
    assert code == 64
    assert "3 spare of 3 nodes leave none to train on" in told


def test_some_of_the_ranks_stand_by(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = Job(slurm, capsys, "--spares=2").begin()
    assert words[:5] == ["launch", "-n", "4", "--spares", "2"]
    job = Job(slurm, capsys, "--spares=2", "--spare-nodes=1", "--recovery=on")
    assert job.begin()[2:8] == ["2", "--mpirun-arg=--host", "--mpirun-arg=n1:2,n2:2", "--spares", "2", "--recovery"]


def test_whether_ranks_survive_each_other_is_for_the_job_to_say(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--recovery" not in Job(slurm, capsys, "--recovery=").begin()
    assert Job(slurm, capsys, "--recovery=off").begin()[3:5] == ["--recovery", "off"]


def test_attempts_without_progress_end_the_job(job: Job) -> None:
    for verdict in ("requeue 75", "requeue 75", "end 75"):
        job.begin()
        assert job.end(75) == verdict
    code, _, told = job.ask("begin")
    assert code == 75
    assert "3 attempts in a row have left no newer checkpoint than that of step 0" in told


def test_progress_starts_the_count_anew(job: Job) -> None:
    for step in range(10, 60, 10):
        job.begin()
        assert job.end(75) == "requeue 75"
        job.begin()
        job.checkpoint(step)
        assert job.end(71) == "relaunch 71"


def test_a_job_that_is_killed_again_and_again_gives_up(job: Job) -> None:
    for _ in range(3):
        job.begin()
    assert job.ask("begin")[0] == 75


def test_restarts_that_left_no_trace_count(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert job.ask("begin")[0] == 75


@pytest.mark.parametrize(
    ("writer", "verdict"),
    [({"id": 7, "restart_count": 0}, "end 75"), ({"id": 7, "restart_count": 1}, "requeue 75"), (None, "requeue 75")],
)
def test_a_run_that_a_person_has_halted_stays_so(job: Job, writer: dict[str, int] | None, verdict: str) -> None:
    job.begin()
    job.checkpoint(10)
    status = {"stopped_by": "halt", "exit_code": 75, "cause": "asked to stop (halt file) after step 10", "job": writer}
    (job.root / "run/status.json").write_text(json.dumps(status))
    assert job.end(75) == verdict


def test_wrong_arguments_leave_nothing_behind(job: Job) -> None:
    code, _, _ = job.ask("begin", settings=("--set", "train.step=1"))
    assert code == 0
    assert not (job.root / "run").exists()
    assert job.ask("end", "--code=64", settings=("--set", "train.step=1"))[1] == "end 64\n"
    assert not (job.root / "run").exists()


def test_outside_a_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    code, _, told = job.ask("begin")
    assert code == 64
    assert "not in a Slurm job" in told
