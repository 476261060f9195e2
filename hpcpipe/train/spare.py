"""A spare: a process that has all it needs to take a rank's place, and waits without using the processor."""

import signal

from hpcpipe.errors import ExitCode, Interruption
from hpcpipe.faults import hooks
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
        hooks.point("idle")
        beacon.nap("ALL", None, -1, -1, lambda: "a rank's place")
        if crew.is_revoked():
            raise Interruption("the ranks meet")
        try:
            content = crew.listen(member.root)
        except CommunicationError as error:
            raise Interruption("the rank that speaks for the run has died") from error
        if content is None:
            _nap()
        elif len(content) == 1:
            return ExitCode(content[0])
        else:
            member.outline = Outline.from_bytes(content)


def _nap() -> None:
    signal.sigtimedwait({WAKE}, _LOOK_S)
