"""How the model of a checkpoint differs from that of a configuration."""

import json
from typing import Any


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
    return _differences("", header_of_checkpoint, expected)


def _differences(prefix: str, found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Walk both dicts, in the order of their keys."""
    sentences: list[str] = []
    for key in dict.fromkeys((*expected, *found)):
        if isinstance(found.get(key), dict) and isinstance(expected.get(key), dict):
            sentences += _differences(f"{prefix}{key}.", found[key], expected[key])
        elif _text(found, key) != _text(expected, key):
            sentences.append(f"{prefix}{key}: checkpoint {_text(found, key)}, config {_text(expected, key)}")
    return sentences


def _text(values: dict[str, Any], key: str) -> str:
    """Write one value as JSON does, which knows no tuples."""
    return json.dumps(values[key], sort_keys=True) if key in values else "has none"
