"""Fixtures of the tests that run on every rank of a job."""

import pytest


@pytest.fixture
def comm():
    """All ranks, in a communicator of the test's own; the test ends when every rank has ended it.

    Its messages are as ``HPCPIPE_TEST_MESSAGES`` says.
    """
    # Imported here because a plain pytest that is given a path below this folder reads this file too.
    from mpi4py import MPI
    from support.hard_messages import harden

    duplicate = MPI.COMM_WORLD.Dup()
    yield harden(duplicate)
    duplicate.Barrier()
    duplicate.Free()
