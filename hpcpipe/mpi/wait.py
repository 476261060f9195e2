"""The one function that waits: it tests, yields, and knows when to give up."""

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from mpi4py import MPI

from hpcpipe.errors import RankError

_YIELD_S = 0.2e-3
_YIELD_ON_OWN_CORE_S = 0.1
_SHORTEST_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 1e-3


class Other(NamedTuple):
    """What is waited for, for who watches.

    Attributes
    ----------
    kind : str
        ``SEND``, ``RECV``, or ``ALL`` for collectives.
    name : object
        The message; an action of the schedule for those of a pipeline.
    peer : int
        Process number of the other end, the same in all communicators; -1: all.
    tag : int
        Of the message; -1: none.
    """

    kind: str
    name: object = None
    peer: int = -1
    tag: int = -1


ALL = Other("ALL")
"""What a collective waits for."""


class Watch(Protocol):
    """Who is told what this rank does, so that somebody outside can find hangs; see `hpcpipe.watch`."""

    def begin(self, kind: str, stage: int, microbatch: int) -> None:
        """Hear that an action of the schedule begins."""
        ...

    def end(self) -> None:
        """Hear that it is done."""
        ...

    def posted(self, kind: str, name: object, peer: int, tag: int, num_bytes: int) -> None:
        """Hear that a message is under way."""
        ...

    def nap(self, kind: str, name: object, peer: int, tag: int, what: Callable[[], str]) -> None:
        """Hear, before each nap, that the wait goes on; may raise to end it."""
        ...

    def waited(self, kind: str, name: object, peer: int, tag: int, start_s: float) -> None:
        """Hear that a wait is over."""
        ...


class NoWatch:
    """Nobody is told."""

    def begin(self, kind: str, stage: int, microbatch: int) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""

    def posted(self, kind: str, name: object, peer: int, tag: int, num_bytes: int) -> None:
        """Do nothing."""

    def nap(self, kind: str, name: object, peer: int, tag: int, what: Callable[[], str]) -> None:
        """Do nothing."""

    def waited(self, kind: str, name: object, peer: int, tag: int, start_s: float) -> None:
        """Do nothing."""


class Waiter:
    """Waits for requests without blocking in MPI.

    More ranks than cores is normal on a laptop, so a waiting rank first gives its core to the others and then sleeps
    in growing naps. Where every rank has a core of its own a nap would only make the message late, so that it tests
    for much longer before it sleeps. Python signal handlers run between two tests.

    Parameters
    ----------
    timeout_s : float
        Seconds after which the peer is taken for lost.
    owns_core : bool
        Whether no other rank needs this rank's core while it waits.

    Attributes
    ----------
    timeout_s, owns_core
        As above; the owner may change them.
    waited_s : float
        Seconds spent waiting so far; the owner resets it.
    background : list of callable
        Called one after the other while waiting, for what can go on meanwhile; they must not wait themselves, and may
        raise to end the wait.
    watch : Watch
        Who is told of waits and messages.
    """

    def __init__(self, timeout_s: float, owns_core: bool = False) -> None:
        self.timeout_s = timeout_s
        self.owns_core = owns_core
        self.waited_s = 0.0
        self.background: list[Callable[[], None]] = []
        self.watch: Watch = NoWatch()

    def wait(self, requests: Sequence[MPI.Request], what: Callable[[], str], other: Other = ALL) -> None:
        """Return once all requests are complete.

        Parameters
        ----------
        requests : sequence of Request
            Completed ones are allowed.
        what : callable
            Gives the words for the error: what was waited for, and from whom.
        other : Other
            The same for `watch`.

        Raises
        ------
        RankError
            If `timeout_s` passed.
        MPI.Exception
            If a rank at the other end has died, or has left the communicator to recover.
        """
        pending = _incomplete(requests)
        if not pending:
            return
        start = time.perf_counter()
        stop_yielding = start + (_YIELD_ON_OWN_CORE_S if self.owns_core else _YIELD_S)
        nap_s = _SHORTEST_SLEEP_S
        while pending := _incomplete(pending):
            for work in self.background:
                work()
            if time.perf_counter() < stop_yielding:
                os.sched_yield()
                continue
            self.watch.nap(*other, what)
            time.sleep(nap_s)
            nap_s = min(1.2 * nap_s, _LONGEST_SLEEP_S)
            if time.perf_counter() - start > self.timeout_s:
                raise RankError(
                    f"waited {self.timeout_s:g} s for {what()}: the other rank hangs, or a step takes longer than"
                    " parallel.timeout_s allows (raise it for very large stages)"
                )
        self.waited_s += time.perf_counter() - start
        self.watch.waited(*other, start)


def _incomplete(requests: Sequence[MPI.Request]) -> list[MPI.Request]:
    """Return the requests that are not complete; asked one by one, since `Testall` hides a dead rank behind others."""
    return [request for request in requests if not request.Test()]
