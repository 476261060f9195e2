"""``hpcpipe report``: what happened to a run, from its events and flight recorders."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcpipe.cli.parser import path
from hpcpipe.errors import UsageError

if TYPE_CHECKING:
    from hpcpipe.watch.story import Entry, Story

_QUIET = ("checkpoint", "evaluated", "step time")
_DESCRIPTION = """\
Say what happened to a run: its events, and what every rank did before it hung, died or failed, from the flight
recorders that are kept in RUN_DIR/flight."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "report", help="what happened to a run, and what ranks did before it", description=_DESCRIPTION
    )
    parser.add_argument("directory", type=path, metavar="RUN_DIR", help="the run directory")
    parser.add_argument("--flight", metavar="NAME", help="a folder of RUN_DIR/flight; the newest one by default")
    parser.add_argument("--last", type=int, default=40, metavar="N", help="how many of the last records to show (40)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe report``.

    Raises
    ------
    UsageError
        There is no such run, or no such flight recorder.
    DamagedError
        A flight recorder cannot be read.
    """
    from hpcpipe.telemetry.files import read_lines
    from hpcpipe.telemetry.status import read_status
    from hpcpipe.watch.flight import list_flights, load
    from hpcpipe.watch.story import tell

    directory: Path = args.directory
    if not directory.is_dir() or not ((directory / "events.jsonl").exists() or (directory / "flight").exists()):
        raise UsageError(f"{directory} is no run directory: it has no events.jsonl")
    if args.last < 1:
        raise UsageError(f"--last {args.last}: give a number of records, 1 or more")
    folders = list_flights(directory)
    if args.flight is not None:
        chosen = [folder for folder in folders if folder.name == args.flight]
        if not chosen:
            names = ", ".join(folder.name for folder in folders) or "there are none"
            raise UsageError(f"--flight {args.flight}: no such folder in {directory / 'flight'}: {names}")
        folders = chosen
    flights, cause = load(folders[-1]) if folders else ({}, {})
    story = tell(flights, cause, args.last) if flights else None
    events = read_lines(directory / "events.jsonl")
    status = read_status(directory)
    if args.json:
        recorder = {"folder": str(folders[-1]), **asdict(story)} if story else None
        print(json.dumps({"status": status, "events": events, "flight": recorder}))
        return 0
    _print_status(directory, status, events)
    if story is None:
        print("\nno flight recorders: no rank has hung, died or failed while a supervisor was there")
    else:
        _print_story(folders[-1], story)
    return 0


def _print_status(directory: Path, status: dict[str, Any], events: list[dict[str, Any]]) -> None:
    state = status.get("state", "unknown")
    cause = f": {status['cause']}" if status.get("cause") else ""
    print(f"{directory}: {state} at step {status.get('step', '?')}{cause}")
    print("\nevents")
    for event in events:
        if event.get("event") not in _QUIET:
            print(f"  {event.get('time', '')}  {event.get('event', '')}{_facts(event)}")


def _facts(event: dict[str, Any]) -> str:
    """Say of an event what people want to know first."""
    parts = [str(event["cause"])] if event.get("cause") else []
    parts += [f"step {event['step']}"] if event.get("step") is not None and "step" not in "".join(parts) else []
    parts += [f"{event['seconds']:.3g} s"] if isinstance(event.get("seconds"), float) else []
    parts += [str(event["action"])] if event.get("action") else []
    return ": " + ", ".join(parts) if parts else ""


def _print_story(folder: Path, story: "Story") -> None:
    print(f"\nflight recorders in {folder}: {story.cause.get('text', 'why is not known')}")
    if story.processes:
        print("\nwhat each process did then")
    for line in story.processes.values():
        print(f"  {line}")
    told = set(story.processes.values())
    graph = [line for line in story.graph if line not in told]
    if graph:
        print("\nwho waited for whom")
        for line in graph:
            print(f"  {line}")
    print("\nwhat they did before: seconds before the end, process, step, what, how long")
    for entry in story.entries:
        print(_line(entry))


def _line(entry: "Entry") -> str:
    took = f"{entry.seconds * 1e3:10.3f} ms" if entry.seconds else ""
    return f"  {-entry.before_s:12.6f}  {entry.process:4d}  {entry.step:6d}  {entry.text:<56}{took}".rstrip()
