"""The figures of ``hpcpipe bench step``, from what each rank has measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.waiting import waiting_without_messages


@dataclass(frozen=True)
class Machine:
    """What all ranks together reach.

    Attributes
    ----------
    num_ranks : int
        How many there are.
    peak_flops : float
        FLOP/s in products whose operands stay in cache.
    copy_bytes_per_s : float
        Bytes per second, read and written, of copies in memory.
    """

    num_ranks: int
    peak_flops: float
    copy_bytes_per_s: float


@dataclass
class RankFigures:
    """What one rank has measured in the observed steps.

    Attributes
    ----------
    step_s, waited_s : list of float
        Seconds of each step, and those of them that the rank waited for messages of any kind.
    schedule_waited_s : list of float
        Seconds of each step that it waited for messages before its last compute action ended.
    actions_s : list of list of float
        Seconds of each compute action of each step, in the order of the rank's list.
    kernels : dict of str to (int, float, float, float)
        Calls, seconds, FLOPs and bytes of each kernel in all steps.
    """

    step_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    schedule_waited_s: list[float] = field(default_factory=list)
    actions_s: list[list[float]] = field(default_factory=list)
    kernels: dict[str, tuple[int, float, float, float]] = field(default_factory=dict)

    def add(self, step_s: float, waited_s: float, schedule_waited_s: float, actions_s: list[float]) -> None:
        """Add a step."""
        self.step_s.append(step_s)
        self.waited_s.append(waited_s)
        self.schedule_waited_s.append(schedule_waited_s)
        self.actions_s.append(actions_s)


def step_figures(
    step_s: Sequence[float], bubble: Sequence[float], tokens: int, flops: float, machine: Machine
) -> dict[str, Any]:
    """Return the figures of steps as a run does them.

    Parameters
    ----------
    step_s, bubble : sequence of float
        Seconds and bubble of each step.
    tokens : int
        Of a step.
    flops : float
        Model FLOPs of a step.
    machine : Machine
        What MFU is measured against.
    """
    low, median, high = (float(figure) for figure in np.percentile(step_s, (10, 50, 90)))
    return {
        "tokens_per_s": tokens / median,
        "step_s": median,
        "step_p10_s": low,
        "step_p90_s": high,
        "mfu": flops / median / machine.peak_flops,
        "bubble": float(np.median(bubble)),
        "peak_flops": machine.peak_flops,
        "copy_bytes_per_s": machine.copy_bytes_per_s,
    }


def waiting_figures(schedule: Schedule, ranks: Sequence[RankFigures], num_replicas: int) -> dict[str, float]:
    """Split what ranks wait for messages into what the schedule explains and what it does not.

    Each step is replayed: every rank walks its list with the very times that its actions took in that step, and
    messages take no time. What ranks wait in the replay comes from the order of the actions and from their durations.
    What they waited beyond it is exposed message time: transfers that compute does not hide, and messages that moved
    late because the sender was computing.

    Parameters
    ----------
    schedule : Schedule
        Of each replica.
    ranks : sequence of RankFigures
        All of them, replica by replica, in the order of the pipeline.
    num_replicas : int
        Pipelines.

    Returns
    -------
    dict
        Fractions of the step, means over ranks of the median step: ``waiting``, for messages before a rank's last
        compute action ends; ``scheduled_waiting``, in the replay; ``exposed_messages``, the first less the second, and
        0 if that is below 0.
    """
    pipeline = len(ranks) // num_replicas
    rows = []
    for step, step_s in enumerate(np.mean([rank.step_s for rank in ranks], axis=0).tolist()):
        waited = float(np.mean([rank.schedule_waited_s[step] for rank in ranks]))
        replayed = [
            waiting_without_messages(schedule, [rank.actions_s[step] for rank in ranks[first : first + pipeline]])
            for first in range(0, len(ranks), pipeline)
        ]
        explained = float(np.mean(replayed))
        rows.append((waited / step_s, explained / step_s, (waited - explained) / step_s))
    waiting, scheduled, exposed = np.median(rows, axis=0).tolist()
    return {"waiting": waiting, "scheduled_waiting": scheduled, "exposed_messages": max(0.0, exposed)}


def kernel_rows(ranks: Sequence[RankFigures], machine: Machine) -> dict[str, Any]:
    """Say where the time of a step goes, summed over ranks.

    Parameters
    ----------
    ranks : sequence of RankFigures
        All of them.
    machine : Machine
        What kernels could reach: the floors assume that a rank has its share of the peak and of the bandwidth.

    Returns
    -------
    dict
        ``observed_step_s``, seconds of a step, summed over ranks, of which ``waiting_s`` are spent on waiting for
        messages of any kind and ``other_s`` neither on that nor on kernels: Python, numpy, calls of MPI; and
        ``kernels``, the costliest first, each with ``name``, per step ``calls seconds flops bytes``, ``share`` of the
        step, ``flops_per_s`` (None without products), ``bytes_per_s``, and the least seconds that it could take:
        ``peak_s`` by its operations at the peak, ``copy_s`` by its bytes at the bandwidth of a copy, both None where a
        kernel has neither.
    """
    num_steps = len(ranks[0].step_s)
    total_s = sum(sum(rank.step_s) for rank in ranks) / num_steps
    waiting_s = sum(sum(rank.waited_s) for rank in ranks) / num_steps
    sums: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, figures in rank.kernels.items():
            sums[name] = sums.get(name, np.zeros(4)) + np.array(figures) / num_steps
    rows = [_kernel_row(name, figures.tolist(), total_s, machine) for name, figures in sums.items()]
    rows.sort(key=lambda row: -row["seconds"])
    return {
        "observed_step_s": total_s,
        "waiting_s": waiting_s,
        "other_s": total_s - waiting_s - sum(row["seconds"] for row in rows),
        "kernels": rows,
    }


def _kernel_row(name: str, figures: Sequence[float], total_s: float, machine: Machine) -> dict[str, Any]:
    calls, seconds, flops, num_bytes = figures
    return {
        "name": name,
        "calls": calls,
        "seconds": seconds,
        "share": seconds / total_s,
        "flops": flops,
        "bytes": num_bytes,
        "flops_per_s": flops / seconds if flops else None,
        "bytes_per_s": num_bytes / seconds if num_bytes else None,
        "peak_s": flops * machine.num_ranks / machine.peak_flops if flops else None,
        "copy_s": num_bytes * machine.num_ranks / machine.copy_bytes_per_s if num_bytes else None,
    }
