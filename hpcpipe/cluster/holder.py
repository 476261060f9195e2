"""Who holds a run directory: the content of its lock file, and whether that process can still be there."""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hpcpipe.cluster import slurm
from hpcpipe.cluster.environment import LAUNCH_ID


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    Host names repeat, in containers above all, and process numbers are reused: only all of these together name a
    process.

    Attributes
    ----------
    host, boot_id, pid_namespace : str
        The node, the start of its kernel, and the namespace that the process number counts in.
    pid : int
        The process number there.
    process_start : str
        When the process started, in clock ticks after the start of the kernel.
    cluster : str
        Slurm's name of the cluster; empty outside Slurm.
    job, restart_count : int
        Slurm's number of the job, 0 outside Slurm, and how often it was requeued.
    launch_id : str
        The start by ``hpcpipe launch`` that the process belongs to; empty without it.
    started : str
        When the lock was taken, for people.
    fence : str
        Unique to this taking of the lock: who finds another one in the file has lost it.
    """

    host: str = ""
    boot_id: str = ""
    pid_namespace: str = ""
    pid: int = 0
    process_start: str = ""
    cluster: str = ""
    job: int = 0
    restart_count: int = 0
    launch_id: str = ""
    started: str = ""
    fence: str = ""

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host or 'no host'}{job}"

    def to_bytes(self) -> bytes:
        """Return the content of a lock file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Holder | None":
        """Read the content of a lock file; None if it says nothing that can be understood."""
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict):
            return None
        kinds = {field.name: type(field.default) for field in fields(cls)}
        known: dict[str, Any] = {name: found[name] for name in kinds if name in found}
        if any(type(value) is not kinds[name] for name, value in known.items()):
            return None
        return cls(**known)

    def is_of_same_run(self, other: "Holder") -> bool:
        """Tell whether two descriptions are of one process, or of a launcher and a rank that it started."""
        if self.launch_id:
            return self.launch_id == other.launch_id
        names = ("boot_id", "pid_namespace", "pid", "process_start")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def this_process(environ: Mapping[str, str] = os.environ) -> Holder:
    """Describe this process, with a fence of its own.

    Parameters
    ----------
    environ : mapping
        Where Slurm's facts and the name of the launch are read from.
    """
    allocation = slurm.allocation(environ)
    return Holder(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()),
        cluster=slurm.cluster_name(environ),
        job=allocation.job_id if allocation else 0,
        restart_count=allocation.restart_count if allocation else 0,
        launch_id=environ.get(LAUNCH_ID, ""),
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
        fence=os.urandom(16).hex(),
    )


def fence_of(path: Path) -> str:
    """Return the fence in a lock file.

    Parameters
    ----------
    path : Path
        The lock file.

    Returns
    -------
    str
        Empty if there is no lock, or it cannot be read.
    """
    try:
        holder = Holder.from_bytes(path.read_bytes())
    except OSError:
        return ""
    return holder.fence if holder else ""


def is_known_alive(holder: Holder, me: Holder, renewed: float) -> bool | None:
    """Tell whether a holder is still there, as far as that can be known at once.

    Parameters
    ----------
    holder : Holder
        Who holds the lock.
    me : Holder
        Who asks.
    renewed : float
        When the lock file was last renewed, in seconds since 1970.

    Returns
    -------
    bool or None
        None where only time can tell: a live holder renews its lock.
    """
    if not holder.host:
        return False
    if holder.boot_id and (holder.boot_id, holder.pid_namespace) == (me.boot_id, me.pid_namespace):
        return bool(holder.process_start) and process_start(holder.pid) == holder.process_start
    is_same_cluster = bool(holder.job) and bool(holder.cluster) and holder.cluster == me.cluster
    if is_same_cluster and holder.job == me.job:
        # Slurm ends a job everywhere before it starts it again.
        return False if holder.restart_count < me.restart_count else None
    has_rebooted = holder.host == me.host and holder.boot_id != me.boot_id and bool(holder.boot_id)
    # Another machine of the same name would have renewed the lock since.
    if has_rebooted and renewed < _boot_time():
        return False
    if is_same_cluster and slurm.has_ended(holder.job):
        return False
    return None


def process_start(pid: int) -> str:
    """Return when a process of this machine started, in clock ticks; empty if it has ended: numbers are reused."""
    try:
        # The name of the program, in parentheses, may be any bytes.
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return ""
    # In a container nobody may ever collect a killed orphan: it stays as a zombie.
    return "" if words[0] in "ZX" else words[19]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _boot_time() -> float:
    """Return when this kernel started, in seconds since 1970; 0 if it does not say."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), 0.0)
