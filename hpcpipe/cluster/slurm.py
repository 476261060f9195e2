"""What Slurm granted; the only place that reads its variables.

Under ``mpirun`` a rank on a remote node sees the task counts of the daemon that started it, so only the
job's own facts are used there: job, nodes, restarts. Task numbers count only below ``srun``.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
_ENDED |= {"PENDING", "PREEMPTED", "REVOKED", "TIMEOUT"}

STEP_OPTIONS = (
    "SLURM_CPUS_PER_TASK",
    "SLURM_DISTRIBUTION",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NNODES",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE",
)
"""Facts of the job that ``srun`` takes for options of a step."""

OVERLAP = "SLURM_OVERLAP"
"""Variable that lets steps of a job share processors."""


@dataclass(frozen=True)
class Allocation:
    """The allocation that this process runs in.

    Attributes
    ----------
    job_id : int
        Slurm's number of the job.
    num_nodes : int
        Nodes granted.
    node_list : str
        Their names in Slurm's short form, such as ``n[1-4]``.
    num_tasks_per_node : int or None
        Tasks asked for on each node; on nodes that differ, the largest. None where Slurm does not say.
    restart_count : int
        How often the job was requeued.
    num_cpus_per_node : int or None
        Processors granted on each node, hardware threads where Slurm counts these; on nodes that differ, the fewest.
        None where Slurm does not say.
    """

    job_id: int
    num_nodes: int
    node_list: str
    num_tasks_per_node: int | None
    restart_count: int
    num_cpus_per_node: int | None = None


def allocation(environ: Mapping[str, str] = os.environ) -> Allocation | None:
    """Read the facts of the allocation.

    Parameters
    ----------
    environ : mapping
        Environment of the batch script, a step or a rank.

    Returns
    -------
    Allocation or None
        None outside Slurm.
    """
    job_id = environ.get("SLURM_JOB_ID", "")
    if not job_id.isdecimal():
        return None
    tasks = environ.get("SLURM_NTASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    return Allocation(
        job_id=int(job_id),
        num_nodes=_number(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES") or 1,
        node_list=environ.get("SLURM_JOB_NODELIST", ""),
        num_tasks_per_node=max(_counts(tasks), default=None),
        restart_count=_number(environ, "SLURM_RESTART_COUNT") or 0,
        num_cpus_per_node=min(_counts(environ.get("SLURM_JOB_CPUS_PER_NODE", "")), default=None),
    )


def cluster_name(environ: Mapping[str, str] = os.environ) -> str:
    """Return Slurm's name of the cluster that this process runs on; numbers of jobs repeat on another one."""
    return environ.get("SLURM_CLUSTER_NAME", "")


def has_ended(job_id: int, timeout_s: float = 2.0) -> bool | None:
    """Ask ``squeue`` whether a job of this cluster has ended, or waits to be started again.

    Parameters
    ----------
    job_id : int
        Slurm's number of the job.
    timeout_s : float
        Longest to wait for the answer.

    Returns
    -------
    bool or None
        None where Slurm does not say.
    """
    squeue = shutil.which("squeue")
    if squeue is None:
        return None
    command = [squeue, "-h", "-j", str(job_id), "-t", "all", "-o", "%T"]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    if answer.returncode != 0:
        return True if "Invalid job id" in answer.stderr else None
    return set(answer.stdout.split()) <= _ENDED


def task(environ: Mapping[str, str] = os.environ) -> tuple[int, int, int] | None:
    """Read the place of a task that ``srun`` started.

    Parameters
    ----------
    environ : mapping
        Environment of the task; true only where the process was started by ``srun`` itself.

    Returns
    -------
    (rank, size, local_rank) or None
        None where Slurm says nothing.
    """
    size = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    if rank is None or local_rank is None or size is None:
        return None
    return rank, size, local_rank


def _counts(text: str) -> list[int]:
    """Read a count for each kind of node, such as ``4(x2),7``."""
    return [int(count) for count in re.findall(r"(?:^|,)(\d+)", text)]


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """Return the first of these variables that is a number."""
    values = (environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), None)


class AllocationEnd:
    """When the allocation ends: what Slurm said at the start, and what it says when it is asked again each minute.

    Time limits can be changed while a job runs. ``squeue`` is run beside this process, which never waits for it.

    Parameters
    ----------
    environ : mapping
        Environment of a rank.
    """

    _ASK_EVERY_S = 60.0
    _ANSWER_LIMIT_S = 20.0

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        found = allocation(environ)
        self._job_id = found.job_id if found else 0
        self._squeue = shutil.which("squeue", path=environ.get("PATH")) if found else None
        self._end: float | None = None
        self._asked: subprocess.Popen[str] | None = None
        self._asked_at = -self._ASK_EVERY_S
        end_time = _number(environ, "SLURM_JOB_END_TIME")
        if found and end_time:
            self._end = time.monotonic() + end_time - time.time()

    def left_s(self) -> float | None:
        """Return how many seconds are left, None if there is no end or it is not known; takes microseconds."""
        if self._squeue is not None:
            now = time.monotonic()
            if self._asked is not None:
                self._hear(now)
            elif now - self._asked_at >= self._ASK_EVERY_S:
                self._ask(now)
        return None if self._end is None else self._end - time.monotonic()

    def close(self) -> None:
        """End what still asks."""
        if self._asked is not None:
            self._asked.kill()
            self._asked.communicate()
            self._asked = None

    def _ask(self, now: float) -> None:
        self._asked_at = now
        assert self._squeue is not None
        command = [self._squeue, "-h", "-j", str(self._job_id), "-o", "%L"]
        try:
            self._asked = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self._squeue = None

    def _hear(self, now: float) -> None:
        """Take the answer if it is there; one that does not come is given up until the next minute."""
        assert self._asked is not None
        if self._asked.poll() is None and now - self._asked_at < self._ANSWER_LIMIT_S:
            return
        if self._asked.poll() is None:
            self.close()
            return
        answer, code = self._asked.communicate()[0], self._asked.returncode
        self._asked = None
        left_s = read_time_left(answer)
        if code == 0 and left_s is not None:
            self._end = None if left_s == float("inf") else now + left_s


def read_time_left(text: str) -> float | None:
    """Read what ``squeue -o %L`` prints: ``days-hours:minutes:seconds`` from the right, or a word.

    Parameters
    ----------
    text : str
        Its output.

    Returns
    -------
    float or None
        Seconds, infinite without a limit; None if it is not known.
    """
    text = text.strip()
    if text == "UNLIMITED":
        return float("inf")
    # The time is up, and Slurm has not ended the job yet.
    if text == "INVALID":
        return 0.0
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 86400.0 * days + 3600.0 * hours + 60.0 * minutes + seconds
