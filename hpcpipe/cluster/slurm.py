"""What Slurm granted; the only place that reads its variables.

Under ``mpirun`` a rank on a remote node sees the task counts of the daemon that started it, so only the
job's own facts are used there: job, nodes, restarts. Task numbers count only below ``srun``.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
_ENDED |= {"PENDING", "PREEMPTED", "REVOKED", "TIMEOUT"}


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
