"""How the headers of two checkpoints, or a checkpoint's model and that of a configuration, differ."""

import json
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """A key of nested dicts, and its value in both as JSON; None where there is none."""

    key: str
    a: str | None
    b: str | None


def compare(header_of_checkpoint: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """List the differences of two nested dicts, for the message that refuses another model's checkpoint.

    Parameters
    ----------
    header_of_checkpoint : dict
        The header, or the part of it that must agree, such as ``{"model": manifest.header["model"]}``.
    expected : dict
        The same from the configuration. Tuples and lists count as equal.

    Returns
    -------
    list of str
        One sentence for each key that differs, such as ``model.width: checkpoint 128, config 256``.
    """
    return [
        f"{key}: checkpoint {'has none' if found is None else found}, config {'has none' if wanted is None else wanted}"
        for key, found, wanted in differences(header_of_checkpoint, expected)
    ]


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[Difference]:
    """List the keys of two nested dicts that differ: those of `b` in their order, then those that only `a` has.

    Parameters
    ----------
    a, b : dict
        JSON-able. Tuples and lists count as equal.
    prefix : str
        Put before every key.
    """
    found: list[Difference] = []
    for key in dict.fromkeys((*b, *a)):
        if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            found += differences(a[key], b[key], f"{prefix}{key}.")
        elif _text(a, key) != _text(b, key):
            found.append(Difference(f"{prefix}{key}", _text(a, key), _text(b, key)))
    return found


def _text(values: dict[str, Any], key: str) -> str | None:
    """Write one value as JSON does, which knows no tuples."""
    return json.dumps(values[key], sort_keys=True) if key in values else None
