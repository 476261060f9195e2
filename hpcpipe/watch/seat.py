"""A slot of the memory file as the supervisor sees it: who has it, and for how long that has been still."""

import contextlib
import signal
import struct
from dataclasses import dataclass

from hpcpipe.watch.layout import (
    ALIVE_AT,
    COMMAND_AT,
    OVER,
    PACE_AT,
    ROLE_AT,
    SLOT_HEADER_BYTES,
    TEXT_AT,
    TEXT_BYTES,
    WAIT_TEXT_AT,
    WAIT_TEXT_BYTES,
    Command,
    Identity,
    Phase,
    Record,
    State,
    read_ring,
    read_state,
    read_text,
    write_text,
)
from hpcpipe.watch.process import Process
from hpcpipe.watch.verdict import SLOW, Rank


@dataclass
class Seat:
    """A slot, the process that has it, and how long that has been still.

    Attributes
    ----------
    slot : memoryview
        Its bytes.
    identity : Identity
        Who has it.
    process : Process or None
        The process; None if it is gone.
    state : State or None
        What was read last.
    alive_ns : int
        The last sign of life that was seen.
    quiet_s, silent_s : float
        Since the last event, and since the last event or sign of life; counted in turns of the supervisor, each of them
        for half a second at most, so that nobody is blamed for what holds up the whole machine.
    straggler : Rank or None
        As it was seen last while it was still for longer than usual; None if it is not.
    num_slow : int
        For how many turns the rank has been slower than usual.
    is_guilty : bool
        Whether it was killed by the supervisor.
    """

    slot: memoryview
    identity: Identity
    process: Process | None
    state: State | None = None
    alive_ns: int = 0
    quiet_s: float = 0.0
    silent_s: float = 0.0
    straggler: Rank | None = None
    num_slow: int = 0
    is_guilty: bool = False

    def is_alive(self, ended: set[int] | None) -> bool:
        """Return whether the process is there; `ended` are handles of those that are not, if somebody has asked."""
        if self.process is None:
            return False
        if ended is None or self.process.handle < 0:
            return self.process.is_alive()
        return self.process.handle not in ended

    @property
    def is_well(self) -> bool:
        """Whether the rank has moved in the last turn, or is a spare that has shown itself."""
        is_spare = self.state is not None and self.state.phase is Phase.SPARE
        return self.straggler is None and self.pace < SLOW and (self.silent_s if is_spare else self.quiet_s) == 0.0

    def look(self, turn_s: float) -> None:
        """Read what the rank shows, and count how long it has been still."""
        state = read_state(self.slot)
        (alive_ns,) = struct.unpack_from("<q", self.slot, ALIVE_AT)
        has_moved = state is not None and (self.state is None or state.events != self.state.events)
        self.quiet_s = 0.0 if has_moved else self.quiet_s + turn_s
        self.silent_s = 0.0 if has_moved or alive_ns != self.alive_ns else self.silent_s + turn_s
        self.state, self.alive_ns = state or self.state, alive_ns

    @property
    def pace(self) -> float:
        """How many times longer than usual the rank's own part of a step takes."""
        return float(struct.unpack_from("<d", self.slot, PACE_AT)[0])

    @property
    def has_ended(self) -> bool:
        """Whether the rank has said that its part is over."""
        return self.state is not None and self.state.phase in OVER

    @property
    def has_failed(self) -> bool:
        """Whether the rank has said that the run ends with an error."""
        return self.state is not None and self.state.phase is Phase.FAILED

    def kill(self) -> None:
        """End the process."""
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.send(signal.SIGKILL)

    def rank(self) -> Rank | None:
        """Return it for a verdict."""
        if self.state is None:
            return None
        text = read_text(self.slot, WAIT_TEXT_AT, WAIT_TEXT_BYTES)
        role, pace = struct.unpack_from("<qd", self.slot, ROLE_AT)
        mode = self.process.mode() if self.process else ""
        return Rank(self.identity.process, self.state, self.quiet_s, self.silent_s, role - 1, mode, text, pace)

    def records(self) -> list[Record]:
        """Return what is in the flight recorder."""
        return read_ring(bytes(self.slot[SLOT_HEADER_BYTES:]))

    def tell(self, command: Command, text: str) -> None:
        """Ask something of the rank."""
        write_text(self.slot, TEXT_AT, TEXT_BYTES, text)
        (before,) = struct.unpack_from("<q", self.slot, COMMAND_AT)
        struct.pack_into("<q", self.slot, COMMAND_AT, ((before >> 8) + 1) << 8 | command)
