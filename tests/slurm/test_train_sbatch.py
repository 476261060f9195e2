"""``slurm/train.sbatch`` unchanged on a real Slurm: every way to be interrupted, and the rows of a run that was not."""

import contextlib
import json
import re
from pathlib import Path

import pytest
from support.commands import bits, events, rows, run, status
from support.slurm_cluster import wait_until
from support.slurm_desk import Desk

SLOW = {"HPCPIPE_TEST_MESSAGES": "delay=0.02"}
"""Messages are late, so that a run takes seconds and can be met in the middle."""

ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def assert_undisturbed(directory: Path, undisturbed: Path) -> None:
    """Every step is there once, with the text of the run that nobody disturbed."""
    assert status(directory)["state"] == "done"
    steps = [row["step"] for row in rows(directory) if "loss" in row]
    assert steps == sorted(set(steps)) == list(range(1, len(steps) + 1))
    assert bits(directory) == bits(undisturbed)


@pytest.mark.parametrize(
    "options",
    [
        ONE_NODE,
        ("--nodes=3", "--ntasks=4", "--cpus-per-task=2"),
    ],
    ids=["one-node", "uneven-nodes"],
)
def test_one_file_for_any_number_of_nodes(desk: Desk, undisturbed: Path, options: tuple[str, ...]) -> None:
    job = desk.submit(*options)
    assert desk.wait_for(job).exit_code == "0:0", desk.explain(job)
    assert_undisturbed(desk.directory("run"), undisturbed)
    assert desk.output(job).count("train.sbatch: done") == 1
    num_ranks = 4 if "--nodes=1" not in options else 2
    assert events(desk.directory("run"), "started")[0]["ranks"] == num_ranks


def test_the_early_warning_requeues_the_job_again_and_again(desk: Desk, undisturbed: Path) -> None:
    """What Slurm sends ahead of the time limit is sent by scancel here: Slurm looks at limits every 30 s only."""
    job = desk.submit(*TWO_NODES, environ=SLOW)
    for restart, step in ((1, 5), (2, 20)):
        desk.wait_for_steps(job, step)
        desk.cluster.run("scancel", "--batch", "--signal=USR1", job)
        wait_until(
            lambda restart=restart: desk.cluster.job(job).restarts == restart, "requeue", lambda: desk.explain(job)
        )
    ended = desk.wait_for(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", "0:0", 2), desk.explain(job)
    assert_undisturbed(desk.directory("run"), undisturbed)
    directory = desk.directory("run")
    stopped = [event["step"] for event in events(directory, "stopped")]
    assert [event["step"] for event in events(directory, "resumed")] == stopped
    assert len(stopped) == 2
    assert desk.output(job).count("train.sbatch: job ") == 3


def test_requeue_by_hand(desk: Desk, undisturbed: Path) -> None:
    job = desk.submit(*ONE_NODE, environ=SLOW)
    desk.wait_for_checkpoint(job)
    desk.cluster.run("scontrol", "requeue", job)
    ended = desk.wait_for(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), desk.explain(job)
    assert_undisturbed(desk.directory("run"), undisturbed)
    assert events(desk.directory("run"), "resumed")[0]["step"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["scavenge", "spot"])
def test_a_job_that_preempts(desk: Desk, undisturbed: Path, partition: str) -> None:
    """One partition gives a minute, and the warning that the script asks for; the other none."""
    job = desk.submit(*ONE_NODE, f"--partition={partition}", "--exclusive", "--nodelist=n1", environ=SLOW)
    desk.wait_for_steps(job, 12)
    urgent = desk.cluster.submit(
        "--partition=main", "--exclusive", "--nodelist=n1", "--output=/dev/null", "--wrap=true"
    )
    assert desk.wait_for(urgent).state == "COMPLETED"
    ended = desk.wait_for(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), desk.explain(job)
    assert_undisturbed(desk.directory("run"), undisturbed)


def test_cancelled_is_not_requeued(desk: Desk) -> None:
    job = desk.submit(*ONE_NODE, environ=SLOW)
    desk.wait_for_steps(job, 2)
    desk.cluster.run("scancel", job)
    ended = desk.wait_for(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), desk.explain(job)


def test_a_halted_run_is_not_requeued(desk: Desk) -> None:
    job = desk.submit(*ONE_NODE, environ=SLOW)
    desk.wait_for_steps(job, 2)
    assert run(["halt", desk.directory("run")], desk.root / "halt").code == 0
    ended = desk.wait_for(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "75:0", 0), desk.explain(job)
    assert "(halt file)" in desk.output(job)


@pytest.mark.slow
@pytest.mark.parametrize("recovery", ["off", "on"])
def test_a_lost_node_is_left_out(desk: Desk, undisturbed: Path, recovery: str) -> None:
    """The ranks start again in the same allocation: no node has room for one more, so there are fewer."""
    environ = {**SLOW, "HPCPIPE_RECOVERY": recovery}
    job = desk.submit("--nodes=3", "--ntasks-per-node=1", "--nodelist=n1,n2,n3", environ=environ)
    desk.wait_for_checkpoint(job)
    desk.cluster.crash("n2")
    ended = desk.wait_for(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", "0:0", 0), desk.explain(job)
    assert_undisturbed(desk.directory("run"), undisturbed)
    assert "no answer from n2" in desk.output(job)
    directory = desk.directory("run")
    assert [event["ranks"] for event in events(directory, "started")] == [3, 2]
    assert events(directory, "resumed")[0]["step"] >= 10


def is_watched(job: int) -> bool:
    """Tell whether the watch over the first node runs; srun, which starts it, has the same words."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"bash") and words[-4:-2] == [b"watch", str(job).encode()]:
                return True
    return False


@pytest.mark.parametrize("is_told", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_lost_batch_node_requeues_the_job(desk: Desk, undisturbed: Path, is_told: bool) -> None:
    """With --no-kill Slurm would leave the job on the other node, without its script: a watch there requeues it.

    Half a minute goes by until Slurm notices by itself; else it is told.
    """
    job = desk.submit(*TWO_NODES, environ={**SLOW, "HPCPIPE_WATCH_EVERY": "2"})
    desk.wait_for_checkpoint(job)
    wait_until(lambda: is_watched(job), "watch", lambda: desk.explain(job))
    lost = desk.cluster.job(job).batch_host
    desk.cluster.crash(lost)
    if is_told:
        desk.cluster.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    ended = desk.wait_for(job, limit_s=180)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", "0:0", 1), desk.explain(job)
    assert_undisturbed(desk.directory("run"), undisturbed)


@pytest.mark.slow
def test_a_time_limit_that_is_too_short(desk: Desk, undisturbed: Path) -> None:
    """Slurm itself warns: at the first look after the job's start, every 30 s, as half a minute is left."""
    slow = {"HPCPIPE_TEST_MESSAGES": "delay=0.2"}
    job = desk.submit(*TWO_NODES, "--time=1", "--signal=B:USR1@30", environ=slow)
    ended = desk.wait_for(job, limit_s=400)
    assert (ended.state, ended.exit_code) == ("COMPLETED", "0:0"), desk.explain(job)
    assert ended.restarts >= 2
    assert_undisturbed(desk.directory("run"), undisturbed)


def test_ranks_that_always_fail_stop_after_the_limit(desk: Desk, tmp_path: Path) -> None:
    """Once more in the same allocation, once more after a requeue."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('OMPI_COMM_WORLD_RANK') == '1':\n    os._exit(3)\n"
    )
    job = desk.submit(*ONE_NODE, environ={"PYTHONPATH": str(tmp_path)})
    ended = desk.wait_for(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "71:0", 1), desk.explain(job)
    # mpirun ends the others only if none of them has begun to start MPI.
    ended_by = "(rank 1 on [^ ]+ has ended|mpirun ended with code 3)"
    assert len(re.findall(f"hpcpipe: error: {ended_by} before the run was done", desk.output(job))) == 3
    assert "3 attempts in a row have left no newer checkpoint" in desk.output(job)
    assert [json.loads(path.read_text())["idle"] for path in desk.directory("run").glob("job-*.json")] == [3]


@pytest.mark.slow
def test_requeueing_without_progress_stops_after_the_limit(desk: Desk) -> None:
    job = desk.submit(
        *ONE_NODE,
        settings=("checkpoint.every=0", "checkpoint.on_signal=false"),
        environ={**SLOW, "HPCPIPE_MAX_IDLE_RESTARTS": "2"},
    )
    for start in (1, 2):
        wait_until(lambda start=start: f"start {start}" in desk.output(job), "start", lambda: desk.explain(job))
        wait_until(
            lambda start=start: desk.output(job).count("\nstep ") > 4 * start, "steps", lambda: desk.explain(job)
        )
        desk.cluster.run("scancel", "--batch", "--signal=USR1", job)
    ended = desk.wait_for(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "75:0", 1), desk.explain(job)
    assert "2 attempts in a row have left no newer checkpoint" in desk.output(job)


@pytest.mark.parametrize(("settings", "code"), [(("train.step=3",), 64), (("data.file=/nowhere/tokens.h5",), 65)])
def test_what_a_restart_cannot_cure_is_not_requeued(desk: Desk, settings: tuple[str, ...], code: int) -> None:
    job = desk.submit(*ONE_NODE, settings=settings)
    ended = desk.wait_for(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", f"{code}:0", 0), desk.explain(job)
    assert desk.output(job).count("hpcpipe: error: ") == 1
