"""``hpcpipe halt``: ask a run to stop through a file in its directory, from any node."""

import argparse
import time

from hpcpipe.cli.parser import path
from hpcpipe.errors import UsageError

_DESCRIPTION = """\
Ask a run to write a checkpoint and stop (exit code 75), by the file `halt` in its directory. The run looks at it
once a second and whenever a step begins, and renames it to `halt.done` when it has stopped."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser("halt", help="ask a run to stop, now or later", description=_DESCRIPTION)
    parser.add_argument("directory", type=path, metavar="RUN_DIR", help="the run directory")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--at-step", type=int, metavar="N", help="stop after step N")
    when.add_argument(
        "--at-time", metavar="T", help="stop at 18:00 or 2026-01-31T18:00:00Z; without a zone: local time"
    )
    when.add_argument("--cancel", action="store_true", help="take the request back")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write or remove the halt file.

    Raises
    ------
    UsageError
        There is no such run, or the moment cannot be understood.
    DiskError
        The file could not be written.
    """
    from hpcpipe.telemetry.files import write_whole
    from hpcpipe.telemetry.status import read_status
    from hpcpipe.train.directory import RunDirectory
    from hpcpipe.train.halt import parse_halt

    directory = RunDirectory(args.directory)
    if not directory.config.exists():
        raise UsageError(f"{args.directory} is no run directory: it has no config.toml")
    if args.cancel:
        directory.halt.unlink(missing_ok=True)
        print(f"{args.directory}: no request to stop any more")
        return 0
    if args.at_step is not None and args.at_step < 0:
        raise UsageError(f"--at-step {args.at_step}: give a step, 0 or more")
    text = "now"
    if args.at_step is not None:
        text = f"step {args.at_step}"
    elif args.at_time is not None:
        text = f"time {args.at_time}"
    now_s = time.time()
    try:
        halt = parse_halt(text, now_s)
    except UsageError:
        raise UsageError(f"--at-time {args.at_time}: give a time such as 18:00 or 2026-01-31T18:00:00Z") from None
    write_whole(directory.halt, text + "\n")
    when = "now" if halt.time_s is None else time.strftime("at %Y-%m-%d %H:%M:%S", time.localtime(halt.time_s))
    print(f"{args.directory}: asked to stop {f'after step {args.at_step}' if args.at_step is not None else when}")
    if not directory.lock.exists():
        done = read_status(args.directory).get("state") == "done"
        more = "the run is done; one that goes on with more steps will stop" if done else "the next start will stop"
        print(f"nothing runs there now: {more}; take the request back with --cancel")
    return 0
