"""What ``hpcpipe checkpoint`` found, laid out for people."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcpipe.checkpoint.difference import Comparison, TensorDifference

_KEYS = ("step", "tokens", "val_loss", "model", "grid", "data", "kernels", "versions")


def describe_difference(found: "Comparison", paths: tuple[Path, Path], with_tensors: bool) -> list[str]:
    """Lay out what ``diff`` found.

    Parameters
    ----------
    found : Comparison
    paths : (Path, Path)
        The two checkpoints.
    with_tensors : bool
        Whether to list every tensor that differs.

    Returns
    -------
    list of str
        Lines.
    """
    lines = [f"a  {paths[0]}", f"b  {paths[1]}"]
    # No two starts have the same fence, so that it tells nothing.
    header = [fact for fact in found.header if fact[0] != "fence"]
    lines += [f"  {key}: a {a or 'has none'}, b {b or 'has none'}" for key, a, b in header]
    for side, keys in (("a", found.only_a), ("b", found.only_b)):
        lines += [f"  only in {side}: {kind} of {name}" for name, kind in keys]
    for kind in dict.fromkeys(tensor.kind for tensor in found.tensors):
        compared = [tensor for tensor in found.tensors if tensor.kind == kind]
        differing = [tensor for tensor in compared if not tensor.is_identical]
        if not differing:
            lines.append(f"  {kind}: all {len(compared):,} tensors identical")
            continue
        elements = sum(tensor.num_differing for tensor in differing)
        lines.append(
            f"  {kind}: {len(differing):,} of {len(compared):,} tensors differ, in {elements:,} elements by at most"
            f" {max(tensor.largest_absolute for tensor in differing):.3g} (absolute) and"
            f" {max(tensor.largest_relative for tensor in differing):.3g} (relative)"
        )
        lines += [f"    {_line(tensor)}" for tensor in differing if with_tensors or tensor.type_a != tensor.type_b]
    lines.append("identical" if found.is_identical else "different")
    return [_printable(line) for line in lines]


def _line(tensor: "TensorDifference") -> str:
    if tensor.type_a != tensor.type_b:
        return f"{tensor.name}: a {tensor.type_a}, b {tensor.type_b}"
    return (
        f"{tensor.name}: {tensor.num_differing:,} of {tensor.num_elements:,} elements by at most"
        f" {tensor.largest_absolute:.3g} and {tensor.largest_relative:.3g}"
    )


def describe(shown: dict[str, Any]) -> str:
    """Lay out what ``show`` found, as its JSON has it, in lines."""
    said = [key for key in _KEYS if shown.get(key) is not None]
    lines = [str(shown["path"]), *(f"  {key:<11}{_inline(shown[key])}" for key in said)]
    lines.append(f"  {'format':<11}version {shown['version']}, {shown['hash']} {shown['digest']}")
    lines.append(f"  {'size':<11}{shown['bytes']:,} bytes in {len(shown['files'])} files")
    lines += [f"  {'':<11}{file['name']}  {file['bytes']:,} bytes  {file['digest']}" for file in shown["files"]]
    lines.append(f"  {'tensors':<11}{shown['num_tensors']:,} with {shown['num_parameters']:,} parameters")
    for tensor in shown.get("tensors", []):
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        kinds = ", ".join(tensor["kinds"])
        lines.append(f"  {'':<11}{tensor['name']}  {shape}  {tensor['dtype']}  {kinds}  {tensor['bytes']:,} bytes")
    if shown["unknown_files"]:
        lines.append(f"  {'not of it':<11}{', '.join(shown['unknown_files'])}")
    return "\n".join(_printable(line) for line in lines)


def _inline(value: Any) -> str:
    """Write a value of the header on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _printable(line: str) -> str:
    """Replace what could command a terminal: a checkpoint may come from anybody."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)
