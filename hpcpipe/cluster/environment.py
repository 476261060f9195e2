"""What the launcher's variables say before MPI is up, and what a rank needs of its own environment."""

import ctypes
import os
import signal
from collections.abc import Mapping, MutableMapping

from hpcpipe.cluster import slurm
from hpcpipe.errors import UsageError

KERNEL_VARIABLES = ("HPCPIPE_KERNELS", "HPCPIPE_CACHE_DIR")
"""Say how kernels compute and where they are kept; ranks on other nodes get them too."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
LAUNCH_ID = "HPCPIPE_LAUNCH_ID"
TERMINAL = "HPCPIPE_TERMINAL"
SPARES = "HPCPIPE_SPARES"
"""How many of the ranks, the last ones, wait to take the place of one that fails; `hpcpipe launch --spares` sets it."""

_PR_SET_PDEATHSIG = 1


def rank_hint(environ: Mapping[str, str] = os.environ) -> tuple[int, int, int] | None:
    """Tell which rank this process will be, without starting MPI.

    Parameters
    ----------
    environ : mapping
        The process's environment.

    Returns
    -------
    (rank, size, local_rank) or None
        From Open MPI's ``mpirun``, another launcher with PMI, or ``srun --mpi=...``; None for a process on its
        own. ``srun`` without an MPI plugin starts processes that do not know each other: None as well.
    """
    if "OMPI_COMM_WORLD_RANK" in environ:
        return (
            int(environ["OMPI_COMM_WORLD_RANK"]),
            int(environ.get("OMPI_COMM_WORLD_SIZE", "1")),
            int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")),
        )
    rank = environ.get("PMIX_RANK") or environ.get("PMI_RANK")
    if rank is None:
        return None
    if "PMI_SIZE" in environ and "MPI_LOCALRANKID" in environ:
        return int(rank), int(environ["PMI_SIZE"]), int(environ["MPI_LOCALRANKID"])
    return slurm.task(environ)


def num_spares(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many of the ranks are spares.

    Parameters
    ----------
    environ : mapping
        The process's environment.

    Returns
    -------
    int
        0 where nobody said.

    Raises
    ------
    UsageError
        The variable is no number.
    """
    text = environ.get(SPARES, "") or "0"
    if not text.isdecimal():
        raise UsageError(f"{SPARES} = {text!r}: it must be a number; `hpcpipe launch --spares S` sets it")
    return int(text)


def will_be_spare(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process will be a spare, without starting MPI; False where nobody says which rank it is."""
    hint, text = rank_hint(environ), environ.get(SPARES, "")
    return hint is not None and text.isdecimal() and hint[0] >= max(1, hint[1] - int(text))


def terminal_size(environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Return the size of the terminal that shows rank 0's standard output.

    ``mpirun`` gives every rank a terminal of its own, also where its own output goes into a file, so
    ``isatty`` says nothing in a rank; ``hpcpipe launch`` passes the truth on.

    Parameters
    ----------
    environ : mapping
        The process's environment.

    Returns
    -------
    (columns, lines) or None
        None where the output is no terminal, or nobody said.
    """
    columns, x, lines = environ.get(TERMINAL, "").partition("x")
    if not x or not columns.isdigit() or not lines.isdigit():
        return None
    return int(columns), int(lines)


def limit_blas_threads(num_threads: int = 1, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the number of threads that BLAS and OpenMP libraries will start.

    Values that are already there are **overridden**: ranks that share cores run tens of times slower with several
    BLAS threads each, and the order of sums inside BLAS depends on their number, so a value left over in a
    shell would change a run's bits. It must be called before numpy, scipy or numba are imported, because
    these read the variables once.

    Parameters
    ----------
    num_threads : int
        Threads per process, at least 1.
    environ : mutable mapping
        Changed in place.
    """
    for name in THREAD_VARIABLES:
        environ[name] = str(num_threads)


def die_with_parent(signum: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to signal this process as soon as its parent ends, so that no rank outlives its launcher.

    ``mpirun`` that is killed by SIGKILL leaves ranks behind that are computing outside MPI. Does nothing for
    a process whose parent has no child of this kind to look after (no launcher), or outside Linux.

    Parameters
    ----------
    signum : signal.Signals
        What the process gets.
    """
    if rank_hint() is None:
        return
    parent_signal(int(signum))


def parent_signal(signum: int) -> None:
    """Set the signal that Linux sends this process when its parent ends (see prctl(2), PR_SET_PDEATHSIG)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signum)
