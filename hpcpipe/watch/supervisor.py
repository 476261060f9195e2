"""The supervisor of a node: a process outside MPI that finds hangs, says whose they are, and ends them.

``python -m hpcpipe.watch.supervisor MEMORY_FILE`` runs until all ranks of the node have ended, and then removes the
file. How it decides is in docs/hangs.md.
"""

import contextlib
import math
import os
import select
import signal
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from hpcpipe.watch.layout import IDENTITY_AT, Command, read_identity
from hpcpipe.watch.memory import MemoryFile
from hpcpipe.watch.notebook import Evidence, Notebook
from hpcpipe.watch.process import Process
from hpcpipe.watch.seat import Seat
from hpcpipe.watch.stacks import collect_stacks
from hpcpipe.watch.verdict import SLOW, Rank, find_culprits, find_slow, is_deadlock, is_straggling

_TURN_S = 0.5
_CLOSE_TURN_S = 0.2
_LOST_TURN_S = 0.05
_SETTLE_S = 0.2
_PRINT_S = 0.05
_AFTERMATH_S = 10.0
_SLOW_TURNS = 2


@dataclass
class Supervisor:
    """Looks after the ranks of one memory file.

    Attributes
    ----------
    memory : MemoryFile
        The file.
    notebook : Notebook
        Where findings go.
    """

    memory: MemoryFile
    notebook: Notebook
    _seats: dict[int, Seat] = field(default_factory=dict)
    _lost: dict[int, tuple[Rank | None, bytes]] = field(default_factory=dict)
    _lost_at: float = 0.0
    _killed_at: float = -math.inf
    _has_failed: bool = False
    _polled: list[int] = field(default_factory=list)
    _poller: select.poll = field(default_factory=select.poll)

    def run(self) -> None:
        """Look after the ranks until all have ended."""
        last, ready = time.monotonic(), None
        while True:
            self.memory.sign(os.getpid(), time.monotonic_ns())
            self._seat_ranks()
            now = time.monotonic()
            turn_s, last = min(now - last, _TURN_S), now
            # In this order what they did last is seen.
            gone = [number for number, seat in self._seats.items() if not seat.is_alive(ready)]
            for seat in self._seats.values():
                seat.look(turn_s)
            self._see_failure()
            for number in gone:
                self._part_with(self._seats.pop(number))
            running = [seat for seat in self._seats.values() if not seat.has_ended]
            if self._lost and (not running or now - self._lost_at > _SETTLE_S):
                self._report_lost()
            if not running:
                return
            self._judge()
            ready = self._wait()

    def _seat_ranks(self) -> None:
        """Notice ranks that have come."""
        if self.memory.has_grown():
            self.memory = MemoryFile(self.memory.path, 0)
        for number in range(self.memory.num_slots):
            if number in self._seats:
                continue
            slot = self.memory.slot(number)
            identity = read_identity(slot)
            if identity.process < 0:
                continue
            try:
                self._seats[number] = Seat(slot, identity, Process(identity.pid, identity.started))
            except ProcessLookupError:
                seat = Seat(slot, identity, None)
                seat.look(0.0)
                self._part_with(seat)

    def _part_with(self, seat: Seat) -> None:
        """Note the death of a process, which is a loss if it was not at its end."""
        if seat.process is not None:
            seat.process.close()
        if not seat.has_ended and not seat.is_guilty:
            self._lost[seat.identity.process] = seat.rank(), self.notebook.pack(seat.slot, seat.identity)
            self._lost_at = time.monotonic()
        # Frees the slot, so that nobody looks for the process again.
        struct.pack_into("<q", seat.slot, IDENTITY_AT, 0)
        self.memory.num_gone += 1

    def _wait(self) -> set[int]:
        """Sleep for a turn, or until a process ends; return the handles of those that have."""
        handles = [seat.process.handle for seat in self._seats.values() if seat.process is not None]
        if handles != self._polled:
            self._polled, self._poller = handles, select.poll()
            for handle in handles:
                if handle >= 0:
                    self._poller.register(handle, select.POLLIN)
        turn_s = _LOST_TURN_S if self._lost else _TURN_S if self._all_well() else _CLOSE_TURN_S
        return {handle for handle, _ in self._poller.poll(turn_s * 1000)}

    def _all_well(self) -> bool:
        return all(seat.is_well for seat in self._seats.values())

    def _ranks(self) -> list[Rank]:
        return [rank for seat in self._seats.values() if (rank := seat.rank()) is not None and not seat.has_ended]

    def _judge(self) -> None:
        """See whether somebody hangs, straggles, or all wait for each other."""
        self._find_slow()
        if self._all_well():
            return
        self._find_stragglers()
        ranks = self._ranks()
        culprits = find_culprits(ranks)
        if culprits:
            self._end_hang(culprits, ranks)
        elif len(ranks) + self.memory.num_gone >= self.memory.num_processes and is_deadlock(ranks):
            self._end_deadlock(ranks)

    def _find_slow(self) -> None:
        """Record ranks that have become slower, once, when that has lasted for two turns."""
        if all(seat.pace < SLOW for seat in self._seats.values()):
            for seat in self._seats.values():
                seat.num_slow = 0
            return
        slow = {rank.process: rank for rank in find_slow(self._ranks())}
        for seat in self._seats.values():
            rank = slow.get(seat.identity.process)
            seat.num_slow = seat.num_slow + 1 if rank is not None else 0
            if rank is not None and seat.num_slow == _SLOW_TURNS:
                self.notebook.slow(rank)

    def _find_stragglers(self) -> None:
        """Record ranks that were still for long and have come back."""
        for seat in self._seats.values():
            rank = seat.rank()
            if rank is None:
                continue
            if is_straggling(rank):
                seat.straggler = rank
            elif seat.straggler is not None:
                self.notebook.straggled(seat.straggler)
                seat.straggler = None

    def _end_hang(self, culprits: list[Rank], ranks: list[Rank]) -> None:
        """Kill those who hang, after everybody's stacks and recorders are safe."""
        evidence = self._take_evidence()
        guilty = [seat for seat in self._seats.values() if seat.identity.process in _numbers(culprits)]
        for seat in guilty:
            seat.look(0.0)
        if not all(seat.quiet_s for seat in guilty):
            # It has come back to life meanwhile.
            return
        self._killed_at = time.monotonic()
        name = self.notebook.new_name()
        text = self.notebook.describe_hang(culprits, ranks, name)
        # Without fault tolerance the launcher ends all ranks at once, and one of them is to print it before.
        time.sleep(_PRINT_S)
        for seat in guilty:
            seat.is_guilty = True
            seat.kill()
        for seat in self._seats.values():
            seat.quiet_s = seat.silent_s = 0.0
            seat.straggler = None
        self.notebook.killed(culprits, evidence, name, text)

    def _end_deadlock(self, ranks: list[Rank]) -> None:
        """Have all ranks recover; the third time that they get into the same deadlock, end the run."""
        evidence = self._take_evidence()
        deadlock = self.notebook.decide_deadlock(ranks, evidence.rings)
        # What the ranks did is kept now, and not once more when they leave.
        self._has_failed = deadlock.command is not Command.RESET
        for seat in self._seats.values():
            seat.quiet_s = 0.0
            if deadlock.command is None:
                seat.kill()
            else:
                seat.tell(deadlock.command, deadlock.text)
        self.notebook.deadlocked(ranks, deadlock, evidence)

    def _see_failure(self) -> None:
        """Keep the flight recorders once if a rank says that the run has failed after its first step."""
        if not self._has_failed and any(seat.has_failed for seat in self._seats.values()):
            self._has_failed = True
            ranks = [rank for seat in self._seats.values() if (rank := seat.rank()) is not None]
            # A start that is refused leaves the run directory as it is.
            if any(rank.state.step > 0 for rank in ranks):
                self.notebook.failed(ranks, self._flights())

    def _flights(self) -> dict[int, bytes]:
        return {seat.identity.process: self.notebook.pack(seat.slot, seat.identity) for seat in self._seats.values()}

    def _take_evidence(self) -> Evidence:
        """Collect what ranks do and did, and where they are."""
        seats = [seat for seat in self._seats.values() if not seat.has_ended]
        rings = {seat.identity.process: seat.records() for seat in seats}
        flights = self._flights()
        processes = {seat.identity.process: (seat.process, seat.identity.stacks) for seat in seats if seat.process}
        return Evidence(rings, flights, collect_stacks(processes))

    def _report_lost(self) -> None:
        """Keep the flight recorders of ranks that died, and what the others did."""
        lost, self._lost = self._lost, {}
        if time.monotonic() - self._killed_at < _AFTERMATH_S and all(seat.has_ended for seat in self._seats.values()):
            # Without fault tolerance the launcher has ended the others.
            return
        flights = {process: content for process, (_, content) in lost.items()} | self._flights()
        self.notebook.lost([rank for rank, _ in lost.values() if rank is not None], flights)


def _numbers(ranks: list[Rank]) -> set[int]:
    return {rank.process for rank in ranks}


def main(path: str) -> None:
    """Supervise the ranks of a memory file, unless another process does.

    Parameters
    ----------
    path : str
        The memory file.
    """
    # What is meant for the ranks, or for the terminal that they were started from, must not end their supervisor.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP):
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(10)
    try:
        memory = MemoryFile(Path(path), 0)
    except OSError:
        return
    if not memory.claim():
        return
    supervisor = Supervisor(memory, Notebook(memory))
    try:
        supervisor.run()
    finally:
        memory.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
