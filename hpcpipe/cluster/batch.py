"""What a batch job does next: end, start the ranks again on the nodes that are left, or go back into the queue."""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

from hpcpipe.cluster import slurm
from hpcpipe.errors import DiskError, ExitCode

_KILLED = 128
_MOST_IDLE_RELAUNCHES = 1
_ANSWER_LIMIT_S = 60.0
_COMMAND_LIMIT_S = 60.0


class Verdict(StrEnum):
    """What the batch script does after the ranks have ended."""

    END = "end"
    RELAUNCH = "relaunch"
    REQUEUE = "requeue"


@dataclass(frozen=True)
class Attempts:
    """What a job remembers from one start of the ranks to the next, in a small file of the run directory.

    Attributes
    ----------
    step : int
        Step of the newest checkpoint when the last attempt began, or ended.
    idle : int
        Attempts in a row, without one under way, after which there was no newer checkpoint.
    is_open : bool
        An attempt has begun and not ended; when the next one begins, it was killed.
    start : str
        Which start of which job wrote it; each has nodes of its own.
    lost : tuple of str
        Nodes of this allocation that do not answer.
    """

    step: int = 0
    idle: int = 0
    is_open: bool = False
    start: str = ""
    lost: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a file; None where there is none that makes sense."""
        try:
            found = json.loads(path.read_bytes())
            return cls(
                step=int(found["step"]),
                idle=int(found["idle"]),
                is_open=bool(found["is_open"]),
                start=str(found["start"]),
                lost=tuple(map(str, found["lost"])),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, path: Path) -> None:
        """Write the file whole, and the run directory if need be.

        Raises
        ------
        DiskError
            If the file system refuses: a job that cannot count must not start again.
        """
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise DiskError(
                f"{path} could not be written ({error.strerror}): free space or choose another run.dir"
            ) from error

    def begin(self, step: int, start: str) -> Self:
        """Return what holds while an attempt runs.

        Parameters
        ----------
        step : int
            Step of the newest checkpoint.
        start : str
            Which start of which job this is.
        """
        idle = self.after(step).idle if self.is_open else self.idle
        lost = self.lost if start == self.start else ()
        return replace(self, step=step, idle=idle, is_open=True, start=start, lost=lost)

    def after(self, step: int) -> Self:
        """Return what holds when an attempt has ended; `step` is that of the newest checkpoint."""
        idle = 0 if step > self.step else self.idle + 1
        return replace(self, step=max(step, self.step), idle=idle, is_open=False)


def decide(
    code: int, attempts: Attempts, max_idle: int, is_warned: bool, is_halted: bool = False
) -> tuple[Verdict, int]:
    """Decide what follows the end of an attempt.

    Parameters
    ----------
    code : int
        Exit code of ``hpcpipe launch``; above 128 a signal has ended it.
    attempts : Attempts
        After this attempt, see `Attempts.after`.
    max_idle : int
        Attempts in a row without a newer checkpoint after which the job ends.
    is_warned : bool
        Slurm has told the job that it will end.
    is_halted : bool
        A person has asked the run to stop, not Slurm.

    Returns
    -------
    (Verdict, int)
        With the exit code of the job, should it end now.
    """
    code = int(ExitCode.RANK_FAILED) if code > _KILLED else code
    follows: dict[int, Verdict] = {ExitCode.STOPPED: Verdict.REQUEUE, ExitCode.RANK_FAILED: Verdict.RELAUNCH}
    again = follows.get(code)
    if again is None or is_halted or attempts.idle >= max_idle:
        return Verdict.END, code
    # Nodes that answer may still be the reason; other ones may not.
    is_in_vain = attempts.idle > _MOST_IDLE_RELAUNCHES
    return (Verdict.REQUEUE if is_warned or is_in_vain else again), code


def spread(nodes: Sequence[str], num_ranks: int, per_node: int, room: int) -> dict[str, int]:
    """Lay ranks on nodes.

    Parameters
    ----------
    nodes : sequence of str
        Names.
    num_ranks : int
        Ranks.
    per_node : int
        Ranks that a node gets, first come, first served, as long as all find a place that way.
    room : int
        Ranks that a node can take.

    Returns
    -------
    dict
        Ranks of each node that gets any; empty where there is no room for all.
    """
    if num_ranks > len(nodes) * max(per_node, room):
        return {}
    if num_ranks > len(nodes) * per_node:
        per_node, more = divmod(num_ranks, len(nodes))
        return {node: per_node + (index < more) for index, node in enumerate(nodes)}
    places: dict[str, int] = {}
    for node in nodes:
        places[node] = min(per_node, num_ranks - sum(places.values()))
    return {node: count for node, count in places.items() if count}


def choose_ranks(
    nodes: Sequence[str], wanted: int, per_node: int, room: int, is_valid: Callable[[int], bool]
) -> dict[str, int]:
    """Lay as many ranks as wanted on nodes; where they have no room, the most that make a valid run.

    Parameters
    ----------
    nodes, per_node, room
        As in `spread`.
    wanted : int
        Ranks that the job was submitted for.
    is_valid : callable
        Tells whether a run can have so many ranks.

    Returns
    -------
    dict
        Ranks of each node; empty where no number will do.
    """
    places = spread(nodes, wanted, per_node, room)
    if places:
        return places
    fewer = range(min(wanted, len(nodes) * max(per_node, room)), 0, -1)
    return spread(nodes, next(filter(is_valid, fewer), 0), per_node, room)


def host_names(node_list: str) -> list[str]:
    """Ask Slurm for the names in a list such as ``n[1-3]``."""
    return _output(["scontrol", "show", "hostnames", node_list]).split()


def current_nodes(job: str, node_list: str) -> list[str]:
    """Return the names of a job's nodes; Slurm takes those away that it finds down.

    Parameters
    ----------
    job : str
        The job's number.
    node_list : str
        Its nodes when it began, in Slurm's short form, for where ``squeue`` does not answer.
    """
    return host_names(_output(["squeue", "-h", "-j", job, "-o", "%N"]).strip() or node_list)


def answering(nodes: Sequence[str]) -> list[str]:
    """Return those nodes of the allocation on which a command can be started, in the same order.

    Nodes that Slurm knows to be down are not tried. The others get a minute, all at once.

    Parameters
    ----------
    nodes : sequence of str
        Names, all of this allocation.
    """
    states = [
        line.split() for line in _output(["sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %t"]).splitlines()
    ]
    down = {words[0] for words in states if words[-1].endswith("*") or words[-1].startswith(("down", "fail", "unk"))}
    left = [node for node in nodes if node not in down]
    if not left:
        return []
    # --overlap: what is left of a step with a lost node holds the processors of its other nodes for minutes.
    probe = ["srun", "--overlap", "--no-kill", "--kill-on-bad-exit=0", "--mpi=none", "--immediate=20", "--input=none"]
    probe += [f"--nodes={len(left)}", f"--ntasks={len(left)}", "--ntasks-per-node=1", "--cpus-per-task=1"]
    probe += [f"--nodelist={','.join(left)}", "sh", "-c", 'echo "answers $SLURMD_NODENAME"']
    heard = _output(probe, _ANSWER_LIMIT_S).splitlines()
    return [node for node in left if f"answers {node}" in heard]


def _output(command: Sequence[str], limit_s: float = _COMMAND_LIMIT_S) -> str:
    """Return what a command of Slurm prints, also where it fails or does not end."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_plain_environ()
    )
    try:
        return process.communicate(timeout=limit_s)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0].decode(errors="replace")


def _plain_environ(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Leave out what would set options of ``srun`` beside those on its command line."""
    options = slurm.STEP_OPTIONS
    return {name: value for name, value in environ.items() if name not in options}
