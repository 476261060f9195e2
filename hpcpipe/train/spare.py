"""A spare: a process that has all it needs to take a rank's place, and waits without using the processor."""

import signal
import time

from hpcpipe.errors import ExitCode, Interruption
from hpcpipe.mpi.crew import CommunicationError
from hpcpipe.train.member import Member
from hpcpipe.train.outline import Outline
from hpcpipe.watch.layout import Phase

_LOOK_S = 0.1
WAKE = signal.SIGURG
"""Wakes spares of the same node at once; ignored by everybody else."""


def be_ready_to_wake() -> None:
    """Let `WAKE` wait until this process asks for it; threads that are started later inherit that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {WAKE})


def wait_as_spare(member: Member) -> ExitCode:
    """Wait until the run is over; return its exit code.

    Raises
    ------
    Interruption
        The ranks meet, because one of them has died.
    """
    crew, beacon = member.crew, member.base.beacon
    beacon.phase(Phase.SPARE)
    while True:
        beacon.nap("ALL", None, -1, -1, lambda: "a rank's place")
        if crew.is_revoked():
            raise Interruption("the ranks meet")
        try:
            content = crew.listen(member.root)
        except CommunicationError:
            # That rank has died, and the others will notice.
            content = None
            time.sleep(_LOOK_S / 10)
        if content is None:
            _nap()
        elif len(content) == 1:
            return ExitCode(content[0])
        else:
            member.outline = Outline.from_bytes(content)


def _nap() -> None:
    signal.sigtimedwait({WAKE}, _LOOK_S)
