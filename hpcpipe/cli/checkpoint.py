"""``hpcpipe checkpoint``: what a checkpoint holds, and whether it is sound."""

import argparse
import json
from typing import Any

from hpcpipe.cli.parser import path
from hpcpipe.errors import ExitCode

_PATH_HELP = "directory of one checkpoint, a checkpoints directory, or a run directory"


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the verb and its two actions to the parser of ``hpcpipe``.

    Parameters
    ----------
    subparsers
        What ``ArgumentParser.add_subparsers`` returned.
    """
    verb = subparsers.add_parser("checkpoint", help="show or verify checkpoints", description=__doc__)
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")

    shown = actions.add_parser(
        "show",
        help="step, model, grid, files and tensors",
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
    verified.add_argument("--json", action="store_true", help="print one JSON object, keys ok and problems")
    verified.set_defaults(run=run_verify)


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
    from hpcpipe.checkpoint.layout import locate
    from hpcpipe.checkpoint.manifest import load_manifest
    from hpcpipe.checkpoint.verify import unknown_files

    path = locate(args.path)[0]
    manifest = load_manifest(path)
    shown: dict[str, Any] = {
        "path": str(path),
        **manifest.header,
        "files": [{"name": file.name, "bytes": file.size_bytes} for file in manifest.files.values()],
        "bytes": manifest.size_bytes,
        "num_tensors": len(manifest.tensors),
        "num_parameters": manifest.num_parameters,
        "unknown_files": unknown_files(path, manifest),
    }
    if args.tensors:
        shown["tensors"] = [
            {"name": name, "shape": list(tensor.shape), "dtype": tensor.dtype, "kinds": list(tensor.kinds)}
            for name, tensor in manifest.tensors.items()
        ]
    print(json.dumps(shown, indent=2) if args.json else _describe(shown))
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


def _describe(shown: dict[str, Any]) -> str:
    """Lay out what ``show`` found for people."""
    said = [key for key in ("step", "tokens", "model", "grid", "data", "versions") if key in shown]
    lines = [str(shown["path"]), *(f"  {key:<11}{_inline(shown[key])}" for key in said)]
    lines.append(f"  {'size':<11}{shown['bytes']:,} bytes in {len(shown['files'])} files")
    lines += [f"  {'':<11}{file['name']}  {file['bytes']:,} bytes" for file in shown["files"]]
    lines.append(f"  {'tensors':<11}{shown['num_tensors']:,} with {shown['num_parameters']:,} parameters")
    for tensor in shown.get("tensors", []):
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        lines.append(f"  {'':<11}{tensor['name']}  {shape}  {tensor['dtype']}  {', '.join(tensor['kinds'])}")
    if shown["unknown_files"]:
        lines.append(f"  {'not of it':<11}{', '.join(shown['unknown_files'])}")
    return "\n".join(lines)


def _inline(value: Any) -> str:
    """Write a value of the header on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
