"""All ranks learn of an error that one of them met, and raise it together."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from mpi4py import MPI

from hpcpipe.errors import BY_CODE, HpcpipeError
from hpcpipe.mpi.collectives import broadcast_bytes, gather_rows
from hpcpipe.mpi.wait import Waiter


def agree(comm: MPI.Intracomm, waiter: Waiter, error: HpcpipeError | None) -> None:
    """Raise the error of the lowest failing rank on every rank, or return on every rank.

    Parameters
    ----------
    comm : Comm
        All ranks call it.
    waiter : Waiter
        Waits, with its deadline.
    error : HpcpipeError or None
        What this rank met.

    Raises
    ------
    HpcpipeError
        Of the same class and with the same text on every rank.
    """
    codes = gather_rows(comm, waiter, np.array([0 if error is None else error.exit_code], np.int32))[:, 0]
    failing = np.flatnonzero(codes)
    if failing.size == 0:
        return
    root = int(failing[0])
    # Names of files that are not UTF-8 are surrogates in Python.
    content = str(error).encode("utf-8", "surrogatepass") if comm.rank == root else None
    text = broadcast_bytes(comm, waiter, content, root).decode("utf-8", "surrogatepass")
    raise BY_CODE[int(codes[root])](text).on_all() from error


@contextmanager
def together(comm: MPI.Intracomm, waiter: Waiter) -> Iterator[None]:
    """Run a block on every rank and leave it together: an `HpcpipeError` of one rank is raised by all.

    The block itself must not communicate, since a rank that fails in it would leave the others waiting.
    """
    error = None
    try:
        yield
    except HpcpipeError as caught:
        error = caught
    agree(comm, waiter, error)
