"""Trying whether ranks can talk: by ``mpirun`` on one node, and in an allocation by each launcher over its nodes."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcpipe.cli.launch import python_command
from hpcpipe.cluster import slurm
from hpcpipe.cluster.slurm import Allocation

_LIMIT_S = 20.0
_ALLOCATION_LIMIT_S = 60.0
_MOST_RANKS_PER_NODE = 2
_SHOWN_NODES = 4


def two_ranks(mpirun: Path) -> tuple[dict[str, Any] | None, str]:
    """Let two ranks exchange messages.

    Parameters
    ----------
    mpirun : Path
        Open MPI's launcher.

    Returns
    -------
    (dict or None, str)
        What rank 0 said, see `hpcpipe.mpi.selftest`, and what went wrong.
    """
    from hpcpipe.cluster import launcher

    environ = launcher.rank_environment(launch_id="doctor", terminal=None)
    command = launcher.mpirun_command(mpirun, 2, program(), launcher.this_machine(), environ=environ)
    return listen(command, environ, _LIMIT_S)


def in_allocation(mpirun: Path | None, allocation: Allocation) -> list[dict[str, Any]]:
    """Try every launcher over all nodes of the allocation, with one or two ranks on each.

    Parameters
    ----------
    mpirun : Path or None
        Open MPI's launcher, where there is one.
    allocation : Allocation
        The allocation.

    Returns
    -------
    list of dict
        ``name command works trouble library threads cores nodes`` of each. ``nodes`` has ``name ranks cores``, where
        ``cores`` says what is bound there.
    """
    per_node = min(allocation.num_tasks_per_node or 1, _MOST_RANKS_PER_NODE)
    num_ranks = per_node * allocation.num_nodes
    tried = []
    if mpirun is not None:
        tried.append(_by_mpirun(mpirun, num_ranks, per_node))
    tried.append(_by_srun(num_ranks, per_node, allocation))
    return tried


def describe(attempt: Mapping[str, Any]) -> str:
    """Say in a line whether a launcher works, and what it binds where.

    Parameters
    ----------
    attempt : mapping
        From `in_allocation`.
    """
    if not attempt["works"]:
        return f"does not work: {attempt['trouble']}"
    nodes = attempt["nodes"]
    shown = [f"{node['name']}: {node['cores']}" for node in nodes[:_SHOWN_NODES]]
    more = f"; and {len(nodes) - _SHOWN_NODES} more" if len(nodes) > _SHOWN_NODES else ""
    return f"works on {len(nodes)} node{'' if len(nodes) == 1 else 's'}; {'; '.join(shown)}{more}"


def _by_mpirun(mpirun: Path, num_ranks: int, per_node: int) -> dict[str, Any]:
    """Start ranks as `hpcpipe launch` does."""
    from hpcpipe.cluster import launcher

    environ = launcher.rank_environment(launch_id="doctor", terminal=None)
    spread = ["--map-by", f"ppr:{per_node}:node"]
    machine = launcher.this_machine()
    # Its daemons are steps, which would wait for the processors of other steps of the job.
    environ[slurm.OVERLAP] = "1"
    with launcher.session_folder(environ):
        command = launcher.mpirun_command(mpirun, num_ranks, program(), machine, spread, environ)
        return _attempt("mpirun", command, environ, num_ranks)


def _by_srun(num_ranks: int, per_node: int, allocation: Allocation) -> dict[str, Any]:
    """Start ranks by ``srun --mpi=pmix``, where that is built in."""
    name = "srun --mpi=pmix"
    srun = shutil.which("srun")
    if srun is None:
        return _failed(name, [], "no srun on PATH")
    plugins = _plugins(srun)
    if not any(plugin.startswith("pmix") for plugin in plugins):
        return _failed(name, [], f"this Slurm has no pmix ({srun} --mpi=list: {', '.join(plugins) or 'no answer'})")
    # srun does not take the processors of a task from the job any more.
    cpus = (allocation.num_cpus_per_node or 1) // (allocation.num_tasks_per_node or 1)
    command = [srun, "--mpi=pmix", "--overlap", "--kill-on-bad-exit=1", f"--nodes={allocation.num_nodes}"]
    command += [f"--ntasks={num_ranks}", f"--ntasks-per-node={per_node}", f"--cpus-per-task={max(cpus, 1)}"]
    return _attempt(name, [*command, *program()], os.environ, num_ranks)


def _plugins(srun: str) -> list[str]:
    """List the kinds of MPI that ``srun`` knows."""
    try:
        result = subprocess.run(
            [srun, "--mpi=list"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except (subprocess.TimeoutExpired, OSError):
        return []
    words = (result.stdout + result.stderr).replace(",", " ").split()
    return [word for word in words if word.startswith(("pmi", "none", "cray"))]


def _attempt(name: str, command: Sequence[str], environ: Mapping[str, str], num_ranks: int) -> dict[str, Any]:
    heard, trouble = listen(command, environ, _ALLOCATION_LIMIT_S)
    if heard is None:
        return _failed(name, command, trouble)
    if heard["size"] != num_ranks:
        alone = f"{num_ranks} ranks were started, and one sees {heard['size']}: mpi4py's library is not this launcher's"
        return _failed(name, command, alone)
    if not heard["arrived"]:
        return _failed(name, command, trouble)
    said = {key: heard[key] for key in ("library", "threads", "cores", "nodes")}
    return {"name": name, "command": " ".join(command), "works": True, "trouble": "", **said}


def _failed(name: str, command: Sequence[str], trouble: str) -> dict[str, Any]:
    nothing: dict[str, Any] = {"library": None, "threads": None, "cores": None, "nodes": []}
    return {"name": name, "command": " ".join(command), "works": False, "trouble": trouble, **nothing}


def program(module: str = "hpcpipe.mpi.selftest") -> list[str]:
    """Return the command that runs a module of this package in a rank."""
    return [*python_command(), "-m", module]


def listen(command: Sequence[str], environ: Mapping[str, str], limit_s: float) -> tuple[dict[str, Any] | None, str]:
    """Start ranks that print one JSON object.

    Parameters
    ----------
    command : sequence of str
        The launcher and its program.
    environ : mapping
        Its environment.
    limit_s : float
        Seconds after which everything is killed.

    Returns
    -------
    (dict or None, str)
        What rank 0 said, and what went wrong.
    """
    from hpcpipe.cluster.banner import BannerFilter

    process = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return None, f"no answer within {limit_s:.0f} s of `{' '.join(command)}`"
    answers = [line for line in stdout.splitlines() if line.startswith(b"{")]
    if answers:
        heard: dict[str, Any] = json.loads(answers[0])
        return heard, "the message did not arrive"
    banner = BannerFilter()
    told = (banner.feed(stderr) + banner.release()).decode(errors="replace").replace("\0", "").split("\n")
    last = next((line for line in reversed(told) if line.strip(" -")), "")
    return None, last.strip() or f"`{' '.join(command)}` ended with code {process.returncode}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a launcher to end its ranks, then kill what is left of its session."""
    from hpcpipe.cluster.processes import kill_session

    process.terminate()
    try:
        process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        kill_session(process.pid)
        process.communicate()
