"""The ``hpcpipe`` command: finds the verb, runs it, and turns errors into one message and an exit code."""

import io
import os
import sys
import time
from collections.abc import Sequence

from hpcpipe import __version__
from hpcpipe.cli import batch, bench, chaos, checkpoint, data, doctor, halt, launch, report, sample, schedule, train
from hpcpipe.cli.parser import Parser, nearest
from hpcpipe.cluster.environment import rank_hint
from hpcpipe.errors import MEANING, DiskError, ExitCode, HpcpipeError, UsageError

VERBS = (launch, train, halt, data, schedule, checkpoint, sample, bench, report, doctor, chaos, batch)

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_FIRST_SPEAKER_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        The process's exit code, see `hpcpipe.errors.ExitCode`; 130 when interrupted from the keyboard.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _ready_streams()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except HpcpipeError as error:
        _report(error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as in `hpcpipe ... | head`.
        _drop_output()
        return _BROKEN_PIPE
    except OSError as error:
        if not _is_output_refused():
            raise
        _drop_output()
        _report(DiskError(f"standard output could not be written ({error.strerror}): free space or write elsewhere"))
        return int(ExitCode.DISK)


def build_parser() -> Parser:
    """Build the parser of all verbs; each verb's parser sets ``run``, a function of the parsed arguments."""
    codes = "\n".join(f"  {code:3d}  {meaning}" for code, meaning in MEANING.items())
    parser = Parser(
        prog="hpcpipe",
        description="Train transformer language models by pipeline parallelism on MPI machines.",
        epilog=f"exit codes:\n{codes}",
    )
    parser.add_argument("--version", action="version", version=f"hpcpipe {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in VERBS:
        verb.add_parser(subparsers)
    return parser


def _run(arguments: list[str]) -> int:
    """Parse and run; argparse's own exits (--help, --version) become return values."""
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return int(ExitCode.USAGE)
    _check_verb(arguments[0])
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return int(parsed.run(parsed))


def _ready_streams() -> None:
    """Open standard streams that were closed, and let text that the output's encoding lacks pass as ``?``."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # In this order, the lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _is_output_refused() -> bool:
    """Tell whether it was standard output that failed: then it still does."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """See that nothing is written to standard output at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_verb(word: str) -> None:
    """Refuse an unknown verb by name."""
    names = [verb.__name__.rpartition(".")[2] for verb in VERBS]
    if word.startswith("-") or word in names:
        return
    hint = nearest(word, names) or f"verbs are {', '.join(names)}"
    raise UsageError(f"no verb {word!r}; {hint}")


def _report(error: HpcpipeError) -> None:
    """Print an error once, although every rank may have met it before MPI was up."""
    hint = rank_hint()
    where = ""
    if hint is not None and hint[0] != 0:
        # Where rank 0 has met the same error it prints and ends, and the launcher ends this rank while it waits.
        time.sleep(_FIRST_SPEAKER_S)
        where = f"rank {hint[0]} on {os.uname().nodename}: "
    kind = "stopped" if error.exit_code is ExitCode.STOPPED else "error"
    print(f"hpcpipe: {kind}: {where}{error}", file=sys.stderr, flush=True)
