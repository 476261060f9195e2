"""Whether what was seen is what a row expects: every difference as a sentence."""

from dataclasses import dataclass
from typing import Any

from hpcpipe.chaos.digest import checkpoint_digests, damaged_checkpoints
from hpcpipe.chaos.row import Event, Expected
from hpcpipe.chaos.seen import Seen
from hpcpipe.errors import DamagedError, ExitCode

_STATES = {ExitCode.DONE: "done", ExitCode.STOPPED: "stopped"}


@dataclass(frozen=True)
class Reference:
    """A run that no fault has met.

    Attributes
    ----------
    bits : list of tuple of str
        `Seen.bits` of it.
    digests : dict of int to str
        Of its checkpoints, by step.
    """

    bits: list[tuple[str, ...]]
    digests: dict[int, str]

    @classmethod
    def of(cls, seen: Seen) -> "Reference":
        """Take the bits of a finished run."""
        return cls(seen.bits, checkpoint_digests(seen.directory))


def judge_end(seen: Seen, expected: Expected, limit_s: float) -> list[str]:
    """Compare how a run with a fault ended.

    Parameters
    ----------
    seen : Seen
        The launch that met the fault.
    expected : Expected
        What must be seen.
    limit_s : float
        Its limit.

    Returns
    -------
    list of str
        What is wrong; empty: nothing.
    """
    problems = list(seen.problems)
    if seen.code is None:
        return [*problems, f"did not end within {limit_s:g} s"]
    if seen.code != expected.code:
        problems.append(f"exit code {seen.code}, not {int(expected.code)}")
    problems += _judge_status(seen.status, expected.code)
    if expected.max_end_s is not None and seen.end_s > expected.max_end_s:
        problems.append(f"ended {seen.end_s:.1f} s after it was asked to, more than {expected.max_end_s:g} s")
    told = " ".join(seen.output.lower().split())
    problems += [f"the output does not say '{text}'" for text in expected.told if text.lower() not in told]
    problems += judge_leftovers(seen)
    for event in expected.events:
        problems += _judge_event(seen.events(event.name), event)
    problems += [f"there is an event '{name}'" for name in expected.absent if seen.events(name)]
    return problems


def judge_leftovers(seen: Seen) -> list[str]:
    """List what a run left behind: processes, shared memory, and checkpoints that are damaged."""
    problems = [f"a {process.kind} is left (process {process.pid}, {process.state})" for process in seen.stray]
    problems += [f"{path} is left" for path in seen.shared]
    return problems + damaged_checkpoints(seen.directory)


def judge_bits(seen: Seen, reference: Reference, *, keeps_metrics: bool = True) -> list[str]:
    """Compare a finished run with one that no fault has met.

    Parameters
    ----------
    seen : Seen
        A launch that went to the last step.
    reference : Reference
        The other run.
    keeps_metrics : bool
        Whether rows of metrics are compared.

    Returns
    -------
    list of str
        What is wrong; empty: weights and moments of every checkpoint, and every row of metrics, are the same.
    """
    try:
        digests = checkpoint_digests(seen.directory)
    except DamagedError as error:
        return [str(error)]
    last = max(reference.digests)
    problems = [] if last in digests else [f"there is no checkpoint of step {last}"]
    for step in sorted(digests):
        if step not in reference.digests:
            problems.append(f"there is a checkpoint of step {step}, which the run without a fault does not have")
        elif digests[step] != reference.digests[step]:
            problems.append(f"weights or moments after step {step} are others than without a fault")
    return problems + (_judge_rows(seen.bits, reference.bits) if keeps_metrics else [])


def _judge_status(status: dict[str, Any], code: int) -> list[str]:
    wanted = {"exit_code": int(code), "state": _STATES.get(ExitCode(code), "failed")}
    wrong = [f"{key} {status.get(key)!r}, not {value!r}" for key, value in wanted.items() if status.get(key) != value]
    return [f"status.json says {fact}" for fact in wrong]


def _judge_event(found: list[dict[str, Any]], event: Event) -> list[str]:
    if len(found) < event.at_least:
        return [f"{len(found)} events '{event.name}', not {event.at_least}"]
    problems = []
    if event.cause and not any(event.cause.lower() in str(row.get("cause", "")).lower() for row in found):
        causes = "; ".join(str(row.get("cause")) for row in found)
        problems.append(f"no '{event.name}' names '{event.cause}' as its cause, but: {causes}")
    for key, most in (("lost_steps", event.max_lost_steps), ("seconds", event.max_s)):
        if most is None:
            continue
        for row in found:
            value = float(row.get(key, "nan"))
            if not value <= most:
                problems.append(f"'{event.name}' says {key} {row.get(key)}, more than {most:g}")
    return problems


def _judge_rows(found: list[tuple[str, ...]], wanted: list[tuple[str, ...]]) -> list[str]:
    """Compare rows of metrics, and say of the first difference what it is."""
    for index, (row, other) in enumerate(zip(found, wanted, strict=False)):
        if row != other:
            kind = "a row twice" if index and row in found[:index] else "another row"
            return [
                f"metrics.jsonl, line {index + 1}: {kind} ({', '.join(row)}) than without a fault ({', '.join(other)})"
            ]
    if len(found) != len(wanted):
        return [f"metrics.jsonl has {len(found)} rows, not {len(wanted)}"]
    return []
