"""What a configuration value may be, and how it is written as TOML."""

import json
import math
from types import UnionType
from typing import Any, get_args, get_origin

LARGEST_INT = 2**63 - 1


class Mismatch(ValueError):
    """A value that does not fit its key; the text says what is expected."""


def convert(value: object, kind: Any) -> Any:
    """Convert a parsed TOML value to the type that the schema declares.

    Parameters
    ----------
    value : object
        What ``tomllib`` returned.
    kind : type
        The declared type: ``str``, ``bool``, ``int``, ``float``, a tuple of these, or a union.

    Returns
    -------
    object
        The value; integers become floats where a float is declared, lists become tuples.

    Raises
    ------
    Mismatch
        The type is another, a number is negative, not finite or beyond 64 bits, or a string is not text.
    """
    if isinstance(kind, UnionType):
        return _convert_union(value, kind)
    if get_origin(kind) is tuple:
        return _convert_list(value, kind)
    if kind is bool:
        if not isinstance(value, bool):
            raise Mismatch(describe(kind))
        return value
    if kind is str:
        return _convert_text(value)
    return _convert_number(value, kind)


def _convert_union(value: object, kind: UnionType) -> Any:
    """Convert to the member that is a list, a string or a number, as the value is."""
    for member in get_args(kind):
        if _shape_of(member) is type(value):
            try:
                return convert(value, member)
            except Mismatch as mismatch:
                raise Mismatch(f"{describe(kind)}: {mismatch}" if isinstance(value, list) else str(mismatch)) from None
    raise Mismatch(describe(kind))


def _shape_of(member: Any) -> type:
    """Return the type that TOML has for a member of a union."""
    return list if get_origin(member) is tuple else member


def _convert_list(value: object, kind: Any) -> tuple[Any, ...]:
    """Convert a list to a tuple, entry by entry."""
    members = get_args(kind)
    if not isinstance(value, list):
        raise Mismatch(describe(kind))
    if members[-1] is Ellipsis:
        members = members[:1] * len(value)
    if len(members) != len(value):
        raise Mismatch(f"{describe(kind)}, and the list has {len(value)}")
    return tuple(convert(entry, member) for entry, member in zip(value, members, strict=True))


def _convert_text(value: object) -> str:
    """Check that a string can be stored as UTF-8 and used in a path."""
    if not isinstance(value, str):
        raise Mismatch(describe(str))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Mismatch("a string in UTF-8") from None
    if "\0" in value:
        raise Mismatch("a string without a NUL character")
    return value


def _convert_number(value: object, kind: type) -> float:
    """Check an int or float; ``bool`` is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Mismatch(describe(kind))
    if kind is int and not isinstance(value, int):
        raise Mismatch(describe(kind))
    if isinstance(value, float) and not math.isfinite(value):
        raise Mismatch("a finite number")
    if value < 0:
        raise Mismatch(f"{describe(kind)} of at least 0")
    if isinstance(value, int) and value > LARGEST_INT:
        raise Mismatch(f"{describe(kind)} of at most {LARGEST_INT}")
    return float(value) if kind is float else value


def describe(kind: Any) -> str:
    """Name a declared type in words."""
    if isinstance(kind, UnionType):
        return " or ".join(describe(member) for member in get_args(kind))
    if get_origin(kind) is tuple:
        members = get_args(kind)
        noun = {"an integer": "integers", "a number": "numbers"}[describe(members[0])]
        return f"a list of {noun}" if members[-1] is Ellipsis else f"a list of {len(members)} {noun}"
    return {str: "a string", bool: "true or false", int: "an integer", float: "a number"}[kind]


def as_toml(value: object) -> str:
    """Write a value as TOML; floats and strings read back to the same value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_toml(entry) for entry in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {as_toml(entry)}" for name, entry in value.items()) + "}"
    return str(value)
