"""``hpcpipe data``: make token files, show what is in them, check them."""

import argparse
import json
from typing import Any

from hpcpipe.cli.parser import path
from hpcpipe.errors import ExitCode, UsageError
from hpcpipe.telemetry.text import visible

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_FILE_HELP = "token file made by `hpcpipe data prepare`"
_NUM_SHOWN = 5


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the verb and its three actions to the parser of ``hpcpipe``.

    Parameters
    ----------
    subparsers
        What ``ArgumentParser.add_subparsers`` returned.
    """
    verb = subparsers.add_parser(
        "data",
        help="prepare, show or verify token files",
        description="Make token files, show what is in them, or check them.",
    )
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")

    prepare = actions.add_parser(
        "prepare",
        help="turn text into a token file",
        description="Turn text into a token file: one token per byte, exact duplicates dropped, in an order that does "
        "not depend on the order of the sources.",
    )
    prepare.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="stdlib (the sources of Python's standard library), a UTF-8 text file, a folder of them, or a .jsonl "
        'file with a document under "text" in every line',
    )
    prepare.add_argument("-o", "--output", metavar="FILE", type=path, required=True, help="token file to write")
    prepare.add_argument("--force", action="store_true", help="replace FILE if it exists")
    prepare.set_defaults(run=run_prepare)

    shown = actions.add_parser(
        "show",
        help="documents, tokens, sizes and digest",
        description="Show what a token file says about itself. Exit code 65 when it is missing or damaged.",
    )
    shown.add_argument("file", metavar="FILE", type=path, help=_FILE_HELP)
    shown.add_argument("--json", action="store_true", help="print one JSON object")
    shown.set_defaults(run=run_show)

    verified = actions.add_parser(
        "verify",
        help="recompute every checksum and hash",
        description="Recompute every checksum, hash and digest of a token file. Exit code 65 when it is damaged.",
    )
    verified.add_argument("file", metavar="FILE", type=path, help=_FILE_HELP)
    verified.add_argument("--json", action="store_true", help="print one JSON object, keys ok and problems")
    verified.set_defaults(run=run_verify)


def run_prepare(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe data prepare``.

    Parameters
    ----------
    args : argparse.Namespace
        ``sources``, ``output``, ``force``.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    UsageError
        The file exists and is not to be replaced or no regular file, a source is missing, or there is no text.
    DamagedError
        A source is not what its name says.
    DiskError
        The file system refused the file.
    """
    if "" in args.sources:
        raise UsageError('an empty SOURCE: name a file or a folder; "." is the current one')
    if args.output.is_file():
        if not args.force:
            raise UsageError(f"{args.output} exists; choose another name, or add --force to replace it")
        with args.output.open("rb") as stream:
            head = stream.read(len(_HDF5_SIGNATURE))
        if not _HDF5_SIGNATURE.startswith(head):
            raise UsageError(f"{args.output} is not an HDF5 file, so --force does not replace it; remove it first")

    from hpcpipe.data.prepare import prepare

    prepare(args.sources, args.output, report=lambda line: print(visible(line)))
    return ExitCode.DONE


def run_show(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe data show``.

    Parameters
    ----------
    args : argparse.Namespace
        ``file``, ``json``.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    DamagedError
        The file is missing, damaged or no token file.
    """
    import numpy as np

    from hpcpipe.data.format import FORMAT, VERSION
    from hpcpipe.data.reader import TokenFile, document_names

    with TokenFile(args.file) as file:
        sizes = np.diff(file.document_offsets).astype(np.int64) - 1
        shown: dict[str, Any] = {
            "file": str(args.file),
            "file_bytes": args.file.stat().st_size,
            "format": FORMAT,
            "version": VERSION,
            "source": file.source,
            "tokenizer": file.tokenizer,
            "vocab": file.vocab,
            "num_documents": file.num_documents,
            "num_tokens": file.num_tokens,
            "text_bytes": file.text_bytes,
            "document_bytes": {
                "smallest": int(sizes.min()),
                "median": int(np.median(sizes)),
                "largest": int(sizes.max()),
            },
            "digest": file.digest,
            "documents": [
                {"name": name, "bytes": size}
                for name, size in zip(document_names(args.file, _NUM_SHOWN), sizes.tolist(), strict=False)
            ],
        }
    print(json.dumps(shown, indent=2) if args.json else _describe(shown))
    return ExitCode.DONE


def run_verify(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe data verify``.

    Parameters
    ----------
    args : argparse.Namespace
        ``file``, ``json``.

    Returns
    -------
    int
        Exit code 0, or 65 when the file is damaged.
    """
    from hpcpipe.data.verify import verify

    problems = verify(args.file)
    if args.json:
        print(json.dumps({"ok": not problems, "problems": problems}, indent=2))
    else:
        print("\n".join(map(visible, problems)) if problems else f"{visible(str(args.file))}: ok")
    return ExitCode.DAMAGED if problems else ExitCode.DONE


def _describe(shown: dict[str, Any]) -> str:
    """Lay out what ``show`` found as aligned text."""
    sizes = shown["document_bytes"]
    rows = {
        "file": f"{shown['file']} ({shown['file_bytes']:,} bytes)",
        "format": f"{shown['format']} {shown['version']}",
        "source": shown["source"],
        "tokenizer": f"{shown['tokenizer']}, {shown['vocab']} ids",
        "documents": f"{shown['num_documents']:,}, of {sizes['smallest']:,} to {sizes['largest']:,} bytes, "
        f"median {sizes['median']:,}",
        "tokens": f"{shown['num_tokens']:,}",
        "text": f"{shown['text_bytes']:,} bytes",
        "digest": shown["digest"],
    }
    lines = [f"{name:<11}{visible(text)}" for name, text in rows.items()]
    lines.append("first documents:")
    width = max(len(f"{document['bytes']:,}") for document in shown["documents"])
    lines += [f"  {document['bytes']:>{width},}  {visible(document['name'])}" for document in shown["documents"]]
    return "\n".join(lines)
