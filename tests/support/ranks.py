"""Running SPMD tests under ``mpirun``, and saying what went wrong on which rank first."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import on_rank

from hpcpipe.cluster.launcher import find_mpirun, mpirun_command, rank_environment, this_machine

TESTS = Path(__file__).parents[1]
NO_TESTS = 5
"""pytest's exit code when nothing was selected."""

MESSAGES = "HPCPIPE_TEST_MESSAGES"
"""Variable that makes all messages hard, see `support.hard_messages`."""

RANK_ARGUMENTS = pytest.StashKey[list[str]]()
"""The tests over ranks that this pytest was asked for: arguments of the ranks' pytest."""


@dataclass(frozen=True)
class Job:
    """One finished ``mpirun`` of pytest.

    Attributes
    ----------
    num_ranks : int
        Ranks that were started.
    returncode : int or None
        ``mpirun``'s; None when the job was ended at its time limit.
    output : str
        What the ranks and ``mpirun`` printed, interleaved.
    events : list of list of dict
        Each rank's report, see `support.on_rank.OnRank`.
    stacks : list of str
        Each rank's stacks, where it crashed or exceeded the limit of a test.
    elapsed_s : float
        Wall time.
    """

    num_ranks: int
    returncode: int | None
    output: str
    events: list[list[dict]]
    stacks: list[str]
    elapsed_s: float

    def results(self, rank: int) -> list[dict]:
        return [event for event in self.events[rank] if event["event"] == "result"]

    def statuses(self) -> list[int | None]:
        """Return each rank's pytest exit code; None for a rank that did not get to the end."""
        return [next((e["status"] for e in events if e["event"] == "end"), None) for events in self.events]

    @property
    def is_empty(self) -> bool:
        """Tell whether no test was selected."""
        return set(self.statuses()) == {NO_TESTS}

    def summary(self) -> str:
        """Count rank 0's outcomes."""
        outcomes = Counter(
            result["outcome"]
            for result in self.results(0)
            if result["phase"] == "call" or result["outcome"] == "skipped"
        )
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        return f"{self.num_ranks} ranks: {counts or 'nothing ran'} in {self.elapsed_s:.1f} s"

    def problem(self) -> str | None:
        """Say what failed first, or None where every rank passed the same tests."""
        failures = [
            (result["time_s"], rank, result)
            for rank in range(self.num_ranks)
            for result in self.results(rank)
            if result["outcome"] == "failed"
        ]
        if failures:
            return self._failure(sorted(failures, key=lambda failure: failure[:2]))
        if self.returncode != 0 or set(self.statuses()) != {0}:
            return self._no_report()
        tests = [[result["test"] for result in self.results(rank)] for rank in range(self.num_ranks)]
        for rank, mine in enumerate(tests):
            if mine != tests[0]:
                difference = sorted(set(mine) ^ set(tests[0]))
                return f"rank {rank} ran other tests than rank 0, or in another order: {difference}"
        return None

    def _failure(self, failures: list[tuple[float, int, dict]]) -> str:
        """Show the first failure in full, the others in a line."""
        first_time, rank, first = failures[0]
        lines = [f"rank {rank} of {self.num_ranks} failed first: {first['test']} ({first['phase']})", first["text"]]
        lines += [
            f"rank {other} failed {time_s - first_time:.3f} s later: {result['test']} ({result['phase']})"
            for time_s, other, result in failures[1:]
        ]
        return "\n".join(lines)

    def _no_report(self) -> str:
        """Say where each rank was when the job ended without a failed test: a crash, or a hang."""
        ending = "was ended at its time limit" if self.returncode is None else f"ended with code {self.returncode}"
        lines = [f"{self.num_ranks} ranks: the job {ending}, and no rank reported a failed test"]
        for rank, events in enumerate(self.events):
            lines.append(f"rank {rank} {_whereabouts(events)}")
            lines += [f"    {line}" for line in self.stacks[rank].splitlines()[:16]]
        return "\n".join([*lines, "end of the output of all ranks:", *self.output.splitlines()[-30:]])


def run_on_ranks(
    num_ranks: int,
    arguments: Sequence[str],
    directory: Path,
    *,
    working_directory: Path = TESTS.parent,
    limit_s: float = 480.0,
    test_limit_s: float = 120.0,
) -> Job:
    """Run pytest on several ranks; nothing of it is left when this returns or raises.

    Parameters
    ----------
    num_ranks : int
        Ranks to start.
    arguments : sequence of str
        Paths and options for each rank's pytest.
    directory : Path
        Where reports go; it must exist and be empty.
    working_directory : Path
        Where the ranks run.
    limit_s : float
        Time for the whole job.
    test_limit_s : float
        Time for each test; a rank beyond it writes its stacks and ends the job.

    Returns
    -------
    Job
        Its reports.
    """
    options = ["--with-mpi", "--timeout=0", "-q", "--no-header", "--color=no"]
    for plugin in ("support.on_rank", "no:cacheprovider", "no:faulthandler"):
        options += ["-p", plugin]
    # -P: the installed package is what is tested, also where the working directory is a checkout of it.
    program = [sys.executable, "-P", "-m", "pytest", *options, *arguments]
    environment = rank_environment("tests", None)
    environment[on_rank.DIRECTORY] = str(directory)
    environment[on_rank.LIMIT_S] = str(test_limit_s)
    if environment.get(MESSAGES):
        # Small messages are copied when their send starts, which hides a buffer that is used again too early; above
        # this many bytes Open MPI fetches them from the buffer when the receive is there.
        environment.setdefault("OMPI_MCA_btl_sm_eager_limit", "128")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), environment.get("PYTHONPATH")]))

    started = time.monotonic()
    with (directory / "output").open("w") as output:
        process = subprocess.Popen(
            mpirun_command(find_mpirun(), num_ranks, program, this_machine()),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=working_directory,
            start_new_session=True,
        )
        try:
            returncode = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            _end_session(process)
    return Job(
        num_ranks,
        returncode,
        (directory / "output").read_text(errors="replace"),
        [_read_events(directory / f"rank-{rank}.jsonl") for rank in range(num_ranks)],
        [_read_text(directory / f"rank-{rank}.stacks") for rank in range(num_ranks)],
        time.monotonic() - started,
    )


def session_members(session: int) -> list[int]:
    """Return the processes of a session that have not ended; ranks have process groups of their own in it."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                members.append(int(entry.name))
    return members


def _end_session(process: subprocess.Popen) -> None:
    """Ask ``mpirun`` to end its ranks, then kill whatever is left of its session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
    deadline = time.monotonic() + 10
    while (members := session_members(process.pid)) and time.monotonic() < deadline:
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    process.wait()


def _whereabouts(events: list[dict]) -> str:
    """Say how far a rank got."""
    if not events:
        return "did not get to the first test"
    last = events[-1]
    if last["event"] == "end":
        return f"ended its session with code {last['status']}"
    if last["event"] == "result" and last["phase"] == "teardown":
        return f"had ended {last['test']}"
    return f"was in {last['test']}"


def _read_text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _read_events(path: Path) -> list[dict]:
    """Read a report; a line that a killed rank did not finish is left out."""
    events = []
    for line in _read_text(path).splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events
