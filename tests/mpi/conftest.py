"""Fixtures of the tests that run on every rank of a job."""

import pytest


@pytest.fixture
def comm():
    """All ranks, in a communicator of the test's own; the test ends when every rank has ended it."""
    # Imported here because a plain pytest that is given a path below this folder reads this file too.
    from mpi4py import MPI

    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    duplicate.Barrier()
    duplicate.Free()
