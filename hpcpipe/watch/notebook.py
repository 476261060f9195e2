"""What a supervisor finds out, in words for people, and where it goes: events, stacks, recorders, the console."""

import contextlib
import json
import os
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcpipe.cluster.holder import fence_of
from hpcpipe.watch import flight
from hpcpipe.watch.graph import at_fault, describe_deadlock, signature
from hpcpipe.watch.layout import Command, Identity, Record
from hpcpipe.watch.memory import MemoryFile
from hpcpipe.watch.process import MODE_WORDS
from hpcpipe.watch.verdict import Rank, name_action

TRIES = 3
"""Equal deadlocks before the run is ended."""


@dataclass(frozen=True)
class Evidence:
    """What ranks did when something was found out, by process number.

    Attributes
    ----------
    rings : mapping of int to list of Record
        What they did before.
    flights : mapping of int to bytes
        The same and more, as files have it.
    stacks : mapping of int to str
        Where they are in the program.
    """

    rings: Mapping[int, Sequence[Record]]
    flights: Mapping[int, bytes]
    stacks: Mapping[int, str]


@dataclass(frozen=True)
class Deadlock:
    """A deadlock, and what is to be done about it.

    Attributes
    ----------
    command : Command or None
        What all ranks are asked for; None: they did not do what they were asked for, and are to be killed.
    text : str
        The words for them.
    lines : list of str
        The wait-for graph.
    count : int
        How often it has been seen.
    """

    command: Command | None
    text: str
    lines: list[str]
    count: int


class Notebook:
    """Writes down what one supervisor finds out.

    It writes to the run directory only once the ranks have said which one it is, which they do when they have its lock,
    and events only as long as they have it. What the file system refuses is lost; nothing else depends on it.

    Parameters
    ----------
    memory : MemoryFile
        Has the facts about the run, and takes notes for the ranks.
    """

    def __init__(self, memory: MemoryFile) -> None:
        self._memory = memory
        self._num_names = 0
        self._seen: dict[tuple[object, ...], int] = {}

    def new_name(self) -> str:
        """Make a name that sorts by time for a folder of stacks and of flight recorders."""
        self._num_names += 1
        return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}-{self._num_names}"

    def pack(self, slot: memoryview, identity: Identity) -> bytes:
        """Return a slot as a flight recorder."""
        content = bytearray(slot)
        struct.pack_into("<q", content, 0, identity.process + 1)
        return flight.pack(bytes(content))

    def describe_hang(self, culprits: Sequence[Rank], ranks: Sequence[Rank], name: str) -> str:
        """Name who hangs, and have another process print it."""
        who = "; ".join(map(_describe_culprit, culprits))
        text = f"hang: {who}: killed" + (f"; see stacks/{name} in the run directory" if self._directory() else "")
        self._print(text, [rank for rank in ranks if rank not in culprits])
        return text

    def killed(self, culprits: Sequence[Rank], evidence: Evidence, name: str, text: str) -> None:
        """Record the end of ranks that hung."""
        for rank in culprits:
            facts = {**_facts(rank), "action": "killed", "stacks": f"stacks/{name}", "flight": f"flight/{name}"}
            self._event("hang", cause=_describe_culprit(rank), **facts)
        self._keep(name, evidence.flights, evidence.stacks, {"what": "hang", "text": text, "ranks": _numbers(culprits)})

    def decide_deadlock(self, ranks: Sequence[Rank], rings: Mapping[int, Sequence[Record]]) -> Deadlock:
        """Say what is to be done about a deadlock, and have a process print it."""
        key = signature(ranks)
        count = self._seen[key] = self._seen.get(key, 0) + 1
        lines = describe_deadlock(ranks, rings)
        step = max(rank.state.step for rank in ranks)
        still_s = min(rank.quiet_s for rank in ranks if rank.is_active)
        fault = at_fault(lines)
        head = f"all ranks wait for each other in step {step}, and nothing has moved for {still_s:.1f} s"
        head += f"; {fault}" if fault else ""
        command = Command.RESET if count < TRIES else Command.GIVE_UP if count == TRIES else None
        ends = {Command.RESET: "they are to recover", Command.GIVE_UP: "the run is ended", None: "they are killed"}
        self._print(f"deadlock: {head} ({count} of {TRIES}): {ends[command]}", ranks)
        graph = "\n  ".join([f"{head}; this was seen {count} times, so that going on does not help", *lines])
        return Deadlock(command, head if command is Command.RESET else graph, lines, count)

    def deadlocked(self, ranks: Sequence[Rank], deadlock: Deadlock, evidence: Evidence) -> None:
        """Record a deadlock."""
        name = self.new_name()
        action = "killed" if deadlock.command is None else deadlock.command.name.lower().replace("_", " ")
        step = max(rank.state.step for rank in ranks)
        seconds = round(min(rank.quiet_s for rank in ranks if rank.is_active), 3)
        self._event(
            "deadlock",
            cause=deadlock.text.split("\n")[0],
            step=step,
            seconds=seconds,
            count=deadlock.count,
            graph=deadlock.lines,
            action=action,
            stacks=f"stacks/{name}",
            flight=f"flight/{name}",
        )
        cause = {"what": "deadlock", "text": deadlock.text.split("\n")[0], "graph": deadlock.lines}
        self._keep(name, evidence.flights, evidence.stacks, cause)

    def straggled(self, rank: Rank) -> None:
        """Record that a rank, as it was last seen, was still for long, and moves again."""
        why, seconds = MODE_WORDS.get(rank.mode, ""), max(rank.quiet_s, rank.silent_s)
        cause = f"{rank.name} was still for {seconds:.1f} s{f', {why}' if why else ''}"
        self._event("straggler", cause=cause, **{**_facts(rank), "seconds": round(seconds, 3), "why": why})
        if why:
            self._print(f"straggler: {cause}, and goes on", [rank])

    def slow(self, rank: Rank) -> None:
        """Record that a rank has become slower."""
        cause = f"{rank.name} takes {rank.pace:.1f} times as long as before for its own part of a step"
        self._event("straggler", cause=cause, **_facts(rank), factor=round(rank.pace, 2))

    def lost(self, ranks: Sequence[Rank], flights: Mapping[int, bytes]) -> None:
        """Keep the flight recorders after deaths."""
        name = self.new_name()
        for rank in ranks:
            self._event(
                "process lost", cause=f"{rank.name} died: {rank.place}", **_facts(rank), flight=f"flight/{name}"
            )
        text = "; ".join(f"{rank.name} died: {rank.place}" for rank in ranks)
        self._keep(name, flights, {}, {"what": "death", "text": text, "ranks": _numbers(ranks)})

    def failed(self, ranks: Sequence[Rank], flights: Mapping[int, bytes]) -> None:
        """Keep the flight recorders of a run that ends with an error."""
        text = f"the run ended with an error after step {max((rank.state.step for rank in ranks), default=0)}"
        self._keep(self.new_name(), flights, {}, {"what": "failed", "text": text, "ranks": _numbers(ranks)})

    def _print(self, text: str, ranks: Sequence[Rank]) -> None:
        """Have the first of some ranks print a text."""
        if ranks:
            self._memory.add_note(min(rank.process for rank in ranks), text)

    def _event(self, event: str, **facts: Any) -> None:
        """Append to the events of the run, in one write, if its lock is still held."""
        directory = self._directory(is_locked=True)
        if directory is None:
            return
        row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, "by": "supervisor", **facts}
        with contextlib.suppress(OSError):
            handle = os.open(directory / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(handle, json.dumps(row).encode() + b"\n")
            finally:
                os.close(handle)

    def _keep(self, name: str, flights: Mapping[int, bytes], stacks: Mapping[int, str], cause: dict[str, Any]) -> None:
        directory = self._directory()
        if directory is None:
            return
        with contextlib.suppress(OSError):
            flight.save(directory, name, flights, cause)
        with contextlib.suppress(OSError):
            if stacks:
                (directory / "stacks" / name).mkdir(parents=True, exist_ok=True)
            for process, text in stacks.items():
                (directory / "stacks" / name / f"rank-{process:04d}.txt").write_text(text)
            flight.prune(directory / "stacks")

    def _directory(self, *, is_locked: bool = False) -> Path | None:
        """Return the run directory; None if there is none yet, or another run has taken it over.

        A run that has just ended has given its lock back, and may still add folders of its own.
        """
        try:
            facts = json.loads(self._memory.facts)
            lock, fence, directory = Path(facts["lock"]), facts["fence"], Path(facts["directory"])
        except (ValueError, KeyError, TypeError):
            return None
        found = fence_of(lock)
        return directory if found == fence or (not is_locked and not lock.exists()) else None


def _facts(rank: Rank) -> dict[str, Any]:
    state = rank.state
    still_s = rank.silent_s if state.wait else rank.quiet_s
    return {
        "process": rank.process,
        "rank": rank.role if rank.role >= 0 else None,
        "step": state.step,
        "phase": state.phase.name.lower(),
        "doing": name_action(state.kind, state.stage, state.microbatch) or None,
        "stage": state.stage if state.stage >= 0 else None,
        "microbatch": state.microbatch if state.microbatch >= 0 else None,
        "seconds": round(still_s, 3),
    }


def _describe_culprit(rank: Rank) -> str:
    still_s = rank.silent_s if rank.state.wait else rank.quiet_s
    why = MODE_WORDS.get(rank.mode, "waits, but gives no sign of life" if rank.state.wait else "computes")
    return f"{rank.name} has not moved for {still_s:.1f} s: {rank.place}: {why}"


def _numbers(ranks: Sequence[Rank]) -> list[int]:
    return sorted(rank.process for rank in ranks)
