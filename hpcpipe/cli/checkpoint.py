"""``hpcpipe checkpoint``: what a checkpoint holds, whether it is sound, and how two differ."""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from hpcpipe.cli.checkpoint_text import describe, describe_difference
from hpcpipe.cli.parser import path
from hpcpipe.errors import ExitCode

if TYPE_CHECKING:
    from hpcpipe.checkpoint.difference import TensorDifference
    from hpcpipe.checkpoint.table import TensorEntry

DIFFERENT = 1
_PATH_HELP = "directory of one checkpoint, a checkpoints directory, or a run directory"


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the verb and its actions to the parser of ``hpcpipe``.

    Parameters
    ----------
    subparsers
        What ``ArgumentParser.add_subparsers`` returned.
    """
    verb = subparsers.add_parser(
        "checkpoint",
        help="show, verify or compare checkpoints",
        description="Show what a checkpoint holds, verify that it is sound, or compare two.",
    )
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")

    shown = actions.add_parser(
        "show",
        help="step, model, grid, files, hashes and tensors",
        description="Show what a checkpoint says about itself, the newest one for a run directory; reads only its "
        "manifest. Exit code 65 when that is missing or damaged.",
    )
    shown.add_argument("path", metavar="PATH", type=path, help=_PATH_HELP)
    shown.add_argument("--tensors", action="store_true", help="list every tensor")
    shown.add_argument("--json", action="store_true", help="print one JSON object")
    shown.set_defaults(run=run_show)

    verified = actions.add_parser(
        "verify",
        help="compare every byte with the hashes",
        description="Compare every file of a checkpoint with its hash, of all checkpoints for a run directory. "
        "Exit code 65 when any is damaged.",
    )
    verified.add_argument("path", metavar="PATH", type=path, help=_PATH_HELP)
    verified.add_argument(
        "--json", action="store_true", help="print one JSON object, keys ok, problems, newest_good and checkpoints"
    )
    verified.set_defaults(run=run_verify)

    compared = actions.add_parser(
        "diff",
        help="what differs between two checkpoints, and by how much",
        description="Compare two checkpoints element by element, the newest one for a run directory, whatever grids "
        "wrote them. Exit code 0 when the step and every bit of every tensor are the same, 1 when not, 65 when one is "
        "damaged; other differences of the headers are only listed.",
    )
    compared.add_argument("a", metavar="A", type=path, help=_PATH_HELP)
    compared.add_argument("b", metavar="B", type=path, help="the same")
    compared.add_argument("--tensors", action="store_true", help="list every tensor that differs")
    compared.add_argument("--json", action="store_true", help="print one JSON object")
    compared.set_defaults(run=run_diff)


def run_show(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe checkpoint show``.

    Parameters
    ----------
    args : argparse.Namespace
        ``path``, ``tensors``, ``json``.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    UsageError
        The path is not a directory.
    DamagedError
        There is no checkpoint, or its manifest is damaged.
    """
    from hpcpipe.checkpoint.digests import digest_key
    from hpcpipe.checkpoint.layout import locate
    from hpcpipe.checkpoint.manifest import load_manifest
    from hpcpipe.checkpoint.verify import unknown_files

    path = locate(args.path)[0]
    manifest = load_manifest(path)
    files = [*manifest.files.values(), *([manifest.view] if manifest.view else [])]
    shown: dict[str, Any] = {
        **manifest.header,
        "path": str(path),
        "version": manifest.version,
        "hash": digest_key(manifest.version),
        "digest": manifest.digest,
        "files": [{"name": file.name, "bytes": file.size_bytes, "digest": file.digest} for file in files],
        "bytes": sum(file.size_bytes for file in files),
        "num_tensors": len(manifest.tensors),
        "num_parameters": manifest.num_parameters,
        "unknown_files": unknown_files(path, manifest),
    }
    if args.tensors:
        shown["tensors"] = [_tensor(name, tensor) for name, tensor in manifest.tensors.items()]
    print(json.dumps(shown, indent=2) if args.json else describe(shown))
    return ExitCode.DONE


def run_verify(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe checkpoint verify``.

    Parameters
    ----------
    args : argparse.Namespace
        ``path``, ``json``.

    Returns
    -------
    int
        Exit code 0, or 65 when a checkpoint is damaged.

    Raises
    ------
    UsageError
        The path is not a directory.
    DamagedError
        There is no checkpoint.
    """
    from hpcpipe.checkpoint.layout import locate
    from hpcpipe.checkpoint.verify import verify

    paths = locate(args.path)
    found = {path: verify(path) for path in paths}
    problems = [problem for path in paths for problem in found[path]]
    newest_good = next((str(path) for path in paths if not found[path]), None)
    if args.json:
        checkpoints = [{"path": str(path), "ok": not found[path], "problems": found[path]} for path in paths]
        report = {"ok": not problems, "problems": problems, "newest_good": newest_good, "checkpoints": checkpoints}
        print(json.dumps(report, indent=2))
    else:
        for path in paths:
            print(f"{path}: {'damaged' if found[path] else 'ok'}")
            for problem in found[path]:
                print(f"  {problem}")
        if len(paths) > 1:
            print(f"newest good: {newest_good or 'none'}")
    return ExitCode.DAMAGED if problems else ExitCode.DONE


def run_diff(args: argparse.Namespace) -> int:
    """Carry out ``hpcpipe checkpoint diff``.

    Parameters
    ----------
    args : argparse.Namespace
        ``a``, ``b``, ``tensors``, ``json``.

    Returns
    -------
    int
        Exit code 0, or 1 when the checkpoints differ.

    Raises
    ------
    UsageError
        A path is not a directory.
    DamagedError
        There is no checkpoint, or it is damaged.
    """
    from hpcpipe.checkpoint.difference import compare_checkpoints
    from hpcpipe.checkpoint.layout import locate

    a, b = (locate(path)[0] for path in (args.a, args.b))
    found = compare_checkpoints(a, b)
    differing = [_difference(tensor) for tensor in found.tensors if not tensor.is_identical]
    if args.json:
        report = {
            "identical": found.is_identical,
            "a": str(a),
            "b": str(b),
            "header": [{"key": key, "a": _value(in_a), "b": _value(in_b)} for key, in_a, in_b in found.header],
            "only_a": [{"name": name, "kind": kind} for name, kind in found.only_a],
            "only_b": [{"name": name, "kind": kind} for name, kind in found.only_b],
            "num_compared": len(found.tensors),
            "differing": differing,
        }
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(describe_difference(found, (a, b), args.tensors)))
    return int(ExitCode.DONE) if found.is_identical else DIFFERENT


def _value(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _difference(tensor: "TensorDifference") -> dict[str, Any]:
    """Make one tensor's difference JSON-able; a difference that is no finite number is null."""
    largest = (tensor.largest_absolute, tensor.largest_relative)
    absolute, relative = (value if math.isfinite(value) else None for value in largest)
    return {
        "name": tensor.name,
        "kind": tensor.kind,
        "type_a": tensor.type_a,
        "type_b": tensor.type_b,
        "num_elements": tensor.num_elements,
        "num_differing": tensor.num_differing,
        "largest_absolute": absolute,
        "largest_relative": relative,
    }


def _tensor(name: str, tensor: "TensorEntry") -> dict[str, Any]:
    """Make one tensor's entry JSON-able."""
    pieces = {
        kind: [{"file": piece.file, "start": piece.start, "stop": piece.stop, "digest": piece.digest} for piece in held]
        for kind, held in tensor.kinds.items()
    }
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "bytes": tensor.size * tensor.item_bytes * len(pieces),
        "kinds": list(pieces),
        "pieces": pieces,
    }
