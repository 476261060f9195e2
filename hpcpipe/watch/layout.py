"""The bytes that a rank shows of itself: what it does now, what it did last, and what it is told.

A memory file is a page about the node, a page of notes to the ranks, and a slot per rank of the node. A slot is a page
about the rank, a page of text for it, and the ring of its flight recorder. Numbers are little-endian. The format is in
docs/run-files.md.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

PAGE = 4096
MAGIC = b"HPCWATCH"
VERSION = 1

RING_RECORDS = 2048
NODE_BYTES = 2 * PAGE
SLOT_HEADER_BYTES = 2 * PAGE

HEADER = struct.Struct("<8sIIIIqq")
"""Magic, version, bytes per slot, records per ring, processes of the run, and one moment on both clocks (ns)."""

SUPERVISOR_AT = 64
"""Where the node's page has the supervisor: its pid, its last sign of life (monotonic ns), and the processes gone."""

FACTS_AT = 128
FACTS_BYTES = PAGE - FACTS_AT
"""Where it has what the ranks let the supervisor know once the run directory is theirs: a text, JSON."""

NOTES_AT = PAGE
NOTE_BYTES = 448
NUM_NOTES = 9
"""What ranks are to print: a count of all texts so far, and the last few, the n-th at ``n % NUM_NOTES``.

Each starts with the number of the process that prints it."""

IDENTITY_AT = 0
IDENTITY = struct.Struct("<qqqqqqq")
"""Process number + 1, pid, its start (clock ticks), descriptor of its stacks, both clocks (ns), hang_s (ns)."""

STATE_AT = 64
STATE = struct.Struct("<qBBBxiiiiiiiixxxxqqqqq")
"""Head, phase, kind, wait, eight numbers, the times event, begin, limit, busy (ns), and the tail: see `State`."""

ALIVE_AT = 192
"""Last sign of life of a rank that waits (monotonic ns)."""

COMMAND_AT = 256
"""What the supervisor asks for, ``serial << 8 | Command``; the words are in the slot's second page."""

ROLE_AT = 264
"""The rank that the process is in the grid, plus 1; 0 for a spare."""

PACE_AT = 272
"""How many times longer than usual its own part of a step takes, as f64; 0 while that is not known."""

WAIT_TEXT_AT = 512
WAIT_TEXT_BYTES = 256
"""What the rank waits for, in words; written once a wait is long."""

TEXT_AT = PAGE
TEXT_BYTES = PAGE
"""The words of a command."""

RECORD = struct.Struct("<qBBhiiiiiqqqq")
"""Number, kind, phase, stage, microbatch, peer, tag, step, epoch, bytes, start and end (monotonic ns), number again."""

RECORD_BYTES = RECORD.size
SLOT_BYTES = SLOT_HEADER_BYTES + RING_RECORDS * RECORD_BYTES

KINDS = (
    "",
    "F",
    "B",
    "I",
    "W",
    "REDUCE",
    "STEP",
    "SEND_F",
    "RECV_F",
    "SEND_B",
    "RECV_B",
    "SEND",
    "RECV",
    "ALL",
    "PHASE",
)
"""What a rank does: an action of the schedule, another message, a collective, or the begin of a phase or step."""

CODES = {name: code for code, name in enumerate(KINDS)}

WAITED = 0x80
"""Added to the kind of a record: the rank waited for it. Without it messages were posted, which takes no time."""


class Phase(IntEnum):
    """What a rank is busy with, at large; the last two once its part is over, well or with an error."""

    SETUP = 0
    TRAIN = 1
    EVALUATE = 2
    CHECKPOINT = 3
    RECOVER = 4
    SPARE = 5
    FINISH = 6
    ENDED = 7
    FAILED = 8


OVER = (Phase.ENDED, Phase.FAILED)


class Command(IntEnum):
    """What the supervisor asks of a rank: nothing, to recover together with the others, or to end the run."""

    NONE = 0
    RESET = 1
    GIVE_UP = 2


@dataclass(frozen=True)
class Identity:
    """Who has a slot.

    Attributes
    ----------
    process : int
        Process number; -1 if nobody has the slot yet.
    pid, started : int
        The process, and when it started, in clock ticks.
    stacks : int
        Its descriptor of the file that SIGUSR2 makes it write its stacks to; -1: none.
    wall_ns, monotonic_ns : int
        One moment on both clocks.
    hang_ns : int
        The configured `recovery.hang_s`; 0: hangs are not looked for.
    """

    process: int
    pid: int
    started: int
    stacks: int
    wall_ns: int
    monotonic_ns: int
    hang_ns: int


@dataclass(frozen=True)
class State:
    """What a rank does.

    Attributes
    ----------
    events : int
        How often this has changed.
    phase : Phase
        At large.
    kind : str
        The action, one of `KINDS`, of `stage` and `microbatch`.
    wait : str
        The message or collective that it waits for, of `wait_stage` and `wait_microbatch`; empty if it computes.
    stage, microbatch, wait_stage, wait_microbatch : int
        As above; -1 where there is none.
    peer, tag : int
        Process number and tag at the other end; -1: everybody, or none.
    step, epoch : int
        The step, and how many recoveries there were.
    event_ns, begin_ns : int
        When this last changed, and when the action began; on the monotonic clock.
    limit_ns : int
        How long the rank may stay as it is; 0: for ever.
    busy_ns : int
        Time that it has spent in actions so far, waits left out.
    """

    events: int
    phase: Phase
    kind: str
    wait: str
    stage: int
    microbatch: int
    wait_stage: int
    wait_microbatch: int
    peer: int
    tag: int
    step: int
    epoch: int
    event_ns: int
    begin_ns: int
    limit_ns: int
    busy_ns: int


@dataclass(frozen=True, order=True)
class Record:
    """One entry of a flight recorder; `number` counts from 1, other names as in `State`."""

    start_ns: int
    number: int
    kind: str
    waited: bool
    phase: Phase
    stage: int
    microbatch: int
    peer: int
    tag: int
    step: int
    epoch: int
    num_bytes: int
    end_ns: int


def read_identity(slot: bytes | memoryview) -> Identity:
    """Read who has a slot."""
    process, *rest = IDENTITY.unpack_from(slot, IDENTITY_AT)
    return Identity(process - 1, *rest)


def read_state(slot: bytes | memoryview) -> State | None:
    """Read what a rank does; None where it is just changing that, or has not said anything sensible.

    A rank writes from the head to the tail. So a reader that takes the tail first, and then finds the same number at
    the head, has read what belongs together.
    """
    (tail,) = struct.unpack_from("<q", slot, STATE_AT + STATE.size - 8)
    head, phase, kind, wait, *rest = STATE.unpack_from(bytes(slot[STATE_AT : STATE_AT + STATE.size]))
    (again,) = struct.unpack_from("<q", slot, STATE_AT)
    if not (tail == head == again == rest[-1]) or phase not in Phase.__members__.values():
        return None
    if max(kind, wait) >= len(KINDS):
        return None
    return State(head, Phase(phase), KINDS[kind], KINDS[wait], *rest[:-1])


def read_ring(ring: bytes | memoryview) -> list[Record]:
    """Read the records of a ring, oldest first; those that are just being written are left out."""
    found = []
    count = len(ring) // RECORD_BYTES
    for position in range(count):
        number, kind, phase, stage, microbatch, peer, tag, step, epoch, num_bytes, start, end, tail = (
            RECORD.unpack_from(ring, position * RECORD_BYTES)
        )
        name, is_phase = kind & ~WAITED, phase in Phase.__members__.values()
        if number < 1 or number != tail or (number - 1) % count != position or name >= len(KINDS) or not is_phase:
            continue
        waited = bool(kind & WAITED)
        found.append(
            Record(
                start,
                number,
                KINDS[name],
                waited,
                Phase(phase),
                stage,
                microbatch,
                peer,
                tag,
                step,
                epoch,
                num_bytes,
                end,
            )
        )
    return sorted(found, key=lambda record: record.number)


def read_text(page: bytes | memoryview, position: int, limit: int) -> str:
    """Read a text: its length as i64, then UTF-8."""
    (length,) = struct.unpack_from("<q", page, position)
    if not 0 <= length <= limit - 8:
        return ""
    return bytes(page[position + 8 : position + 8 + length]).decode(errors="replace")


def write_text(page: memoryview, position: int, limit: int, text: str) -> None:
    """Write a text, cut to what fits."""
    content = text.encode(errors="replace")[: limit - 8]
    struct.pack_into("<q", page, position, 0)
    page[position + 8 : position + 8 + len(content)] = content
    struct.pack_into("<q", page, position, len(content))
