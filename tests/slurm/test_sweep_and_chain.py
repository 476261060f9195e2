"""Several jobs for one purpose: an array of learning rates, and jobs that follow each other."""

from pathlib import Path

import pytest
from support.commands import bits, events, rows, status, step_rows
from support.slurm_cluster import wait_until
from support.slurm_desk import ROOT, TRAIN, Desk

SWEEP, CHAIN = ROOT / "slurm/sweep.sbatch", ROOT / "slurm/chain.sh"
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")
SLOW = {"HPCPIPE_TEST_MESSAGES": "delay=0.02"}


def test_an_array_of_three_learning_rates(desk: Desk, undisturbed: Path) -> None:
    job = desk.submit("--array=0-2", *ONE_NODE, name="", script=SWEEP, environ={"HPCPIPE_RATES": "1e-3 3e-3 9e-3"})
    for task in range(3):
        ended = desk.wait_for(f"{job}_{task}")
        assert (ended.state, ended.exit_code) == ("COMPLETED", "0:0"), desk.explain_all()
    directories = [desk.directory(f"sweep-{task}") for task in range(3)]
    rates = [max(float(row["learning_rate"]) for row in step_rows(directory)) for directory in directories]
    assert rates == [1e-3, 3e-3, 9e-3]
    assert bits(directories[1]) == bits(undisturbed)
    assert bits(directories[0]) != bits(directories[1]) != bits(directories[2])


@pytest.mark.slow
def test_one_task_of_an_array_is_requeued_alone(desk: Desk, undisturbed: Path) -> None:
    job = desk.submit("--array=0-1", *ONE_NODE, name="", script=SWEEP, environ={**SLOW, "HPCPIPE_RATES": "3e-3 9e-3"})
    for task in range(2):
        wait_until(lambda task=task: step_rows(desk.directory(f"sweep-{task}")), "steps", desk.explain_all, 90)
    # This is the task that shares its number with the array.
    desk.cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    ended = [desk.wait_for(f"{job}_{task}") for task in range(2)]
    assert [(task.state, task.restarts) for task in ended] == [("COMPLETED", 0), ("COMPLETED", 1)], desk.explain_all()
    assert bits(desk.directory("sweep-0")) == bits(undisturbed)
    assert [row["step"] for row in step_rows(desk.directory("sweep-1"))] == list(range(1, 41))


@pytest.mark.slow
def test_a_chain_of_jobs_where_requeueing_is_forbidden(desk: Desk, undisturbed: Path) -> None:
    words = [*desk.options, *ONE_NODE, TRAIN, *desk.train_arguments("run")]
    told = desk.cluster.run("bash", CHAIN, 3, *words, environ={**desk.environ, **SLOW}, cwd=ROOT)
    jobs = [int(line.split()[1]) for line in told.splitlines()]
    assert len(jobs) == 3
    desk.wait_for_steps(jobs[0], 12)
    desk.cluster.run("scancel", "--batch", "--signal=USR1", jobs[0])
    ended = [desk.wait_for(job) for job in jobs]
    assert [job.exit_code for job in ended] == ["75:0", "0:0", "0:0"], desk.explain_all()
    assert [job.restarts for job in ended] == [0, 0, 0]
    assert bits(desk.directory("run")) == bits(undisturbed)
    # The third found nothing to do.
    assert "tokens/s" not in desk.output(jobs[2])
    assert len(events(desk.directory("run"), "resumed")) == 1


@pytest.mark.slow
def test_a_job_that_may_not_be_requeued_submits_the_next_one(desk: Desk, undisturbed: Path) -> None:
    job = desk.submit(*ONE_NODE, "--no-requeue", "--time=7", environ={**SLOW, "HPCPIPE_CHAIN": "1"})
    desk.wait_for_steps(job, 12)
    desk.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert desk.wait_for(job).exit_code == "75:0"
    follower = max(int(word) for word in desk.cluster.run("squeue", "-h", "-o", "%A").split())
    assert follower > job
    assert desk.cluster.run("squeue", "-h", "-j", follower, "-o", "%l %D %j").split() == ["7:00", "1", "hpcpipe"]
    assert desk.wait_for(follower).exit_code == "0:0", desk.explain_all()
    assert status(desk.directory("run"))["state"] == "done"
    assert bits(desk.directory("run")) == bits(undisturbed)
    assert len(rows(desk.directory("run"))) == len(rows(undisturbed))
