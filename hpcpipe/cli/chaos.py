"""``hpcpipe chaos``: try what this installation does about faults, and print a table."""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpcpipe.errors import DiskError, ExitCode, UsageError

if TYPE_CHECKING:
    from hpcpipe.chaos.runner import Result

_DESCRIPTION = """\
Run small trainings that meet faults: killed, stopped and slow ranks, damaged numbers, signals, full disks.

Each row of the table is a run that must end by itself in time, with the exit code that is expected, with the
bits of a run without a fault, and must leave nothing behind. The exit code is 0 if all rows held, else 1."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command's parser."""
    parser = subparsers.add_parser("chaos", help="try what runs do about faults", description=_DESCRIPTION)
    parser.add_argument(
        "--rows",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=[],
        metavar="N,...",
        help="rows by number, or cases such as 5.after; default: all but slow ones",
    )
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="repetitions of each row (default 1)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where runs go; those of rows that fail stay there")
    parser.add_argument("--list", action="store_true", dest="only_list", help="print the rows, and run nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out the verb.

    Parameters
    ----------
    args : argparse.Namespace
        ``rows``, ``repeat``, ``dir``, ``only_list``, ``json``.

    Returns
    -------
    int
        0: all rows have held; 1: some have not.

    Raises
    ------
    UsageError
        There is no such row, or no repetition.
    DiskError
        The folder cannot be made.
    RankError
        A run without a fault failed.
    """
    from hpcpipe.chaos.rows import choose
    from hpcpipe.chaos.runner import Runner
    from hpcpipe.chaos.setting import Setting
    from hpcpipe.cli.chaos_table import print_rows, print_table, summary

    rows = choose(args.rows)
    if args.repeat < 1:
        raise UsageError(f"--repeat {args.repeat}: at least 1 is needed")
    if args.only_list:
        print_rows(rows)
        return int(ExitCode.DONE)
    results: list[Result] = []
    with _folder(args.dir) as folder:
        setting = Setting(folder)
        setting.make()
        runner = Runner(setting)
        for row in rows:
            for index in range(args.repeat):
                results.append(runner.run(row, index))
                _say(results[-1], args.repeat)
    if args.json:
        print(json.dumps(summary(results), indent=1))
    else:
        print_table(results)
    return int(ExitCode.DONE) if all(result.is_good for result in results) else 1


@contextlib.contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    """Give the folder that the user has named, or one that is removed at the end if no row has failed."""
    if path is None:
        folder = Path(tempfile.mkdtemp(prefix="hpcpipe-chaos-"))
        yield folder
        # Runs in which a row failed are kept for whoever looks into it.
        if not any((folder / "runs").glob("row-*")):
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"--dir {path}: cannot be made ({error.strerror})") from error
    yield path.resolve()


def _say(result: "Result", num_repetitions: int) -> None:
    """Tell of a row as soon as it is known."""
    number = f" ({result.repetition + 1}/{num_repetitions})" if num_repetitions > 1 else ""
    verdict = "held" if result.is_good else "FAILED"
    lines = [f"row {result.row.name}{number}: {verdict} in {result.elapsed_s:.1f} s: {result.seen}"]
    lines += [f"    {problem}" for problem in result.problems]
    lines += [f"    kept in {result.directory}"] if result.directory else []
    print("\n".join(lines), file=sys.stderr, flush=True)
