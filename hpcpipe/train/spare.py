"""A spare: a process that has all it needs to take a rank's place, and waits without using the processor."""

import os
import signal
import time
from contextlib import suppress

from hpcpipe.errors import ExitCode, Interruption
from hpcpipe.faults import hooks
from hpcpipe.mpi.crew import CommunicationError
from hpcpipe.train.member import Member
from hpcpipe.train.outline import Outline
from hpcpipe.watch.layout import Phase

_LOOK_S = 0.1
_BRISK_LOOK_S = 2e-3
_BRISK_S = 0.2
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
    brisk_until = 0.0
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
            is_brisk = signal.sigtimedwait({WAKE}, _BRISK_LOOK_S if time.monotonic() < brisk_until else _LOOK_S)
            if is_brisk is not None:
                brisk_until = time.monotonic() + _BRISK_S
        elif len(content) == 1:
            return ExitCode(content[0])
        else:
            member.outline = Outline.from_bytes(content)


def wake_spares(member: Member) -> None:
    """Wake the spares of this node, so that they see at once that the ranks meet."""
    own = member.places[member.crew.process]
    for rank in member.spares():
        place = member.places[member.processes[rank]]
        if place.host == own.host:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(place.pid, WAKE)
