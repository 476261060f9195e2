"""A private Slurm on this machine: real daemons, virtual nodes, nothing under ``/etc``, nothing left afterwards."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support import slurm_config
from support.slurm_config import Shape

LONGEST_ROOT = 70
"""Characters of the cluster's folder: the names of sockets below it end at 108."""

ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
)
"""States of a job that is over; a requeued one is PENDING again."""

_NAMESPACES = ("unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_PROBE = "hostname probe && mount --bind /etc/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm"
_UP_LIMIT_S = 60.0
_COMMAND_LIMIT_S = 30.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What Slurm says about a job.

    Attributes
    ----------
    state, reason : str
        As ``scontrol show job`` prints them.
    exit_code : str
        ``code:signal`` of the batch script.
    restarts : int
        How often it was requeued.
    nodes, batch_host : str
        Where it is or was, in Slurm's short form; where its script is, if it runs.
    """

    state: str
    reason: str
    exit_code: str
    restarts: int
    nodes: str
    batch_host: str


@dataclass
class Cluster:
    """A running private Slurm.

    Attributes
    ----------
    root : Path
        Its folder; logs are in ``log``.
    shape : Shape
        What it is made of.
    """

    root: Path
    shape: Shape
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    # Daemons

    def up(self) -> None:
        """Start every daemon, and wait until all nodes are idle."""
        for name in ("munge", "state", "spool", "tmp", "log"):
            (self.root / name).mkdir(mode=0o755)
        key = self.root / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        slurm_config.write(self.root, self.shape)
        munge = [f"--{option}={self.root / 'munge' / file}" for option, file in _MUNGE_FILES]
        self._start("munged", ["munged", "--foreground", "--force", *munge])
        wait_until((self.root / "munge/socket").exists, "munged", self.explain)
        self._start("slurmctld", ["slurmctld", "-D", "-c", "-f", self.root / "slurm.conf"])
        for node in self.shape.nodes:
            self.boot(node)
        wait_until(self._is_ready, "idle nodes", self.explain, _UP_LIMIT_S)

    def down(self) -> None:
        """End every job and every daemon."""
        if not self.shape.has_namespaces and self._is_running("slurmctld"):
            for words in (["--signal=KILL", "--full"], []):
                with contextlib.suppress(subprocess.SubprocessError):
                    self.run("scancel", "--quiet", *words, f"--user={os.geteuid()}", limit_s=10)
        for node in self.shape.nodes:
            self.crash(node)
        for name in ("slurmctld", "munged"):
            self._end(name)

    def crash(self, node: str) -> None:
        """Switch a node off: everything on it is gone at once."""
        # One after the other, they would see each other die and act on it: hold them first, with what they start.
        for number in () if self.shape.has_namespaces else (signal.SIGSTOP, signal.SIGSTOP, signal.SIGKILL):
            for pid in self._processes_of(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self._end(f"node {node}")

    def boot(self, node: str) -> None:
        """Switch a node on."""
        if self.shape.has_namespaces:
            command: list[object] = [*_NAMESPACES, "--propagation", "slave", self.root / "node_start", node]
        else:
            (self.root / "tmp" / node).mkdir(exist_ok=True)
            command = ["slurmd", "-D", "-f", self.root / "slurm.conf", "-N", node]
        self._start(f"node {node}", command)

    def heal(self) -> None:
        """Cancel what a test left in the queue, and have every node idle again."""
        self.run("scancel", "--quiet", f"--user={os.geteuid()}", check=False)
        for node in self.shape.nodes:
            if not self._is_running(f"node {node}"):
                self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=boot", check=False)
                self.boot(node)
        wait_until(self._is_ready, "idle nodes", self.explain, _UP_LIMIT_S)

    # Jobs

    @property
    def environ(self) -> dict[str, str]:
        """The environment of commands and jobs: without what belongs to another allocation or launcher."""
        foreign = ("SLURM_", "SBATCH_", "OMPI_", "PMIX_", "PRTE_", "HPCPIPE_BIND", "HPCPIPE_LAUNCH_ID")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {**kept, "SLURM_CONF": str(self.root / "slurm.conf")}

    def run(
        self, *words: object, environ: Mapping[str, str] | None = None, check: bool = True,
        limit_s: float = _COMMAND_LIMIT_S, cwd: Path | None = None,
    ) -> str:  # fmt: skip
        """Run a command of Slurm, and return what it prints."""
        result = subprocess.run(
            [str(word) for word in words],
            env={**self.environ, **(environ or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
        assert result.returncode == 0 or not check, f"{words}: {result.returncode}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, *words: object, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
        """Submit a batch script, and return the job's number."""
        return int(self.run("sbatch", "--parsable", *words, environ=environ, cwd=cwd))

    def job(self, job: int | str) -> Job:
        """Return what Slurm says about a job or a task of an array."""
        line = self.run("scontrol", "show", "job", "-o", job).splitlines()[0]
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        return Job(
            facts["JobState"],
            facts["Reason"],
            facts["ExitCode"],
            int(facts["Restarts"]),
            facts["NodeList"],
            facts.get("BatchHost", ""),
        )

    def wait_for(
        self, job: int | str, *states: str, limit_s: float = 60.0, explain: Callable[[], str] | None = None
    ) -> Job:
        """Wait until a job is in one of these states, by default over; fail if it ends in another."""
        seen = self.job(job)
        deadline = time.monotonic() + limit_s
        while seen.state not in (states or ENDED):
            late = time.monotonic() > deadline
            if late or seen.state in ENDED:
                raise AssertionError(f"job {job}: {seen}, not {states or 'over'} {(explain or self.explain)()}")
            time.sleep(0.1)
            seen = self.job(job)
        return seen

    def explain(self) -> str:
        """Return the ends of the logs."""
        logs = sorted((self.root / "log").glob("*"))
        ends = {path.name: path.read_text(errors="replace").splitlines()[-12:] for path in logs}
        return "".join(f"\n--- {name}\n" + "\n".join(lines) for name, lines in ends.items())

    # Inside

    def _start(self, name: str, command: Sequence[object]) -> None:
        """Start a daemon that ends with this process, however that ends."""
        with (self.root / "log" / f"{name.replace(' ', '-')}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [str(word) for word in command],
                env={**self.environ, "HPCPIPE_TEST_NODE": f"{self.root}:{name}"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        if not name.startswith("node"):
            # slurmctld has a child of its own, which it ends.
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        daemon.kill()
        daemon.wait(10)
        if name.startswith("node") and self.shape.has_namespaces:
            # The kernel ends process 1 of the node, and with it all others, when unshare has ended.
            node = name.partition(" ")[2]
            wait_until(lambda: not self._processes_of(node), f"end of {name}", self.explain, 10)

    def _is_running(self, name: str) -> bool:
        daemon = self._daemons.get(name)
        return daemon is not None and daemon.poll() is None

    def _is_ready(self) -> bool:
        ended = [name for name in self._daemons if not self._is_running(name)]
        assert not ended, f"ended: {ended} {self.explain()}"
        try:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t", check=False, limit_s=5).split()
        except subprocess.TimeoutExpired:
            return False
        return states == ["idle"] * self.shape.num_nodes

    def _processes_of(self, node: str) -> list[int]:
        """List what runs on a node, by its environment."""
        found = []
        own = f"HPCPIPE_TEST_NODE={self.root}:node {node}".encode()
        job = (f"SLURM_CONF={self.root}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode())
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if own in variables or all(variable in variables for variable in job):
                found.append(int(folder.name))
        return found


_MUNGE_FILES = (
    ("key-file", "key"),
    ("socket", "socket"),
    ("pid-file", "pid"),
    ("log-file", "log"),
    ("seed-file", "seed"),
)


@contextlib.contextmanager
def running(shape: Shape) -> Iterator[Cluster]:
    """Give a cluster of this shape; with plain nodes where namespaces are not allowed."""
    root = Path(tempfile.mkdtemp(prefix="slurm-")).resolve()
    assert len(str(root)) <= LONGEST_ROOT, f"{root} is longer than {LONGEST_ROOT} characters: set a shorter TMPDIR"
    # Tasks of other users' jobs would have to pass, and slurmd asks for it.
    root.chmod(0o755)
    cluster = Cluster(root, shape if can_namespace() else Shape(**{**vars(shape), "has_namespaces": False}))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(root, ignore_errors=True)


def can_namespace() -> bool:
    """Tell whether nodes can have namespaces of their own."""
    try:
        return subprocess.run([*_NAMESPACES, "sh", "-c", _PROBE], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def has_network() -> bool:
    """Tell whether ``mpirun`` can reach another node: it needs an interface beside the loopback."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return any(not line.strip().startswith("lo:") for line in lines) and _resolves()


def _resolves() -> bool:
    """Tell whether names can be looked up, which Slurm wants an address beside 127.0.0.1 for."""
    try:
        return bool(socket.getaddrinfo("localhost", None, socket.AF_INET, flags=socket.AI_ADDRCONFIG))
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], what: str, explain: Callable[[], str], limit_s: float = 30.0) -> None:
    """Poll a condition; fail with an explanation if it does not hold in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {limit_s:g} s {explain()}"
        time.sleep(0.05)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
