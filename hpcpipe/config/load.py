"""Reading a configuration from a TOML file and ``--set section.key=value`` overrides."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hpcpipe.config.nearest import unknown_key, unknown_section
from hpcpipe.config.schema import Config, RunConfig
from hpcpipe.config.values import Mismatch, as_toml, convert
from hpcpipe.errors import UsageError

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

SECTIONS: dict[str, Any] = {section.name: section.type for section in fields(Config)}
KINDS: dict[str, dict[str, Any]] = {
    name: {entry.name: entry.type for entry in fields(section)} for name, section in SECTIONS.items()
}

Values = dict[tuple[str, str], tuple[object, str]]
"""(section, key) -> (value, how a message about it begins)."""


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration; what the file leaves out keeps its default.

    Parameters
    ----------
    path : Path
        TOML file with the sections and keys of `hpcpipe.config.schema`.
    overrides : sequence of str
        ``section.key=value`` each, later ones win. The value is read as TOML, and as plain text where it is
        not TOML or the key is a string.

    Returns
    -------
    Config
        Every key has its declared type; relations between keys are the matter of `hpcpipe.config.check`.

    Raises
    ------
    UsageError
        The file is missing or not TOML, or keys are unknown or of the wrong type. All of them are named.
    """
    path = Path(path)
    problems: list[str] = []
    values = _collect(path, overrides, problems)
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for (section, name), (value, origin) in values.items():
        try:
            sections[section][name] = _convert(section, name, value)
        except Mismatch as mismatch:
            problems.append(f"{origin}{section}.{name} = {as_toml(value)}: expected {mismatch}")
    if problems:
        raise UsageError("\n".join(problems))
    return Config(**{name: SECTIONS[name](**keys) for name, keys in sections.items()})


def run_directory(path: Path, overrides: Sequence[str] = ()) -> Path | None:
    """Find the run directory, as far as possible also of a configuration that is wrong elsewhere.

    Parameters
    ----------
    path : Path
        Configuration file.
    overrides : sequence of str
        As for `load`.

    Returns
    -------
    Path or None
        ``<run.dir>/<run.name>``; None where the file cannot be read or these two keys are wrong.
    """
    try:
        values = _collect(Path(path), overrides, [])
        run = {
            name: _convert(section, name, value)
            for (section, name), (value, _) in values.items()
            if section == "run" and name in ("dir", "name")
        }
    except (UsageError, Mismatch):
        return None
    config = RunConfig(**run)
    return Path(config.dir) / config.name


def _collect(path: Path, overrides: Sequence[str], problems: list[str]) -> Values:
    """Collect the known keys of the file, then those of the overrides."""
    values = _known_values(_read(path), f"{path}: ", problems)
    for override in overrides:
        values.update(_override(override, problems))
    return values


def _convert(section: str, name: str, value: object) -> Any:
    """Convert to the declared type; run.dir and run.name must also make a directory of their own."""
    converted = convert(value, KINDS[section][name])
    if (section, name) == ("run", "name") and not RUN_NAME.fullmatch(converted):
        raise Mismatch("letters, digits, dots, dashes and underscores, the first a letter or digit")
    if (section, name) == ("run", "dir") and not converted:
        raise Mismatch('a directory; "." is the current one')
    return converted


def _read(path: Path) -> dict[str, Any]:
    """Parse the file, or say why it cannot be parsed."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}): is it a TOML file?") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path!r}: not a file name: {error}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}{_quote(text, str(error))}") from None


def _quote(text: str, message: str) -> str:
    """Return the line that a message of tomllib points at."""
    found = re.search(r"at line (\d+)", message)
    lines = text.splitlines()
    if not found or int(found[1]) > len(lines):
        return ""
    return f"\n    {lines[int(found[1]) - 1].strip()}"


def _known_values(tables: dict[str, Any], origin: str, problems: list[str]) -> Values:
    """Collect (section, key) -> (value, origin); unknown names go to the problems."""
    values: Values = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            problems.append(f"{origin}{unknown_section(section, table, KINDS)}")
        elif not isinstance(table, dict):
            problems.append(f"{origin}{section} = {as_toml(table)}: expected a section, [{section}]")
        else:
            for name, value in table.items():
                if name in KINDS[section]:
                    values[section, name] = value, origin
                else:
                    problems.append(f"{origin}{unknown_key(section, name, value, KINDS)}")
    return values


def _override(override: str, problems: list[str]) -> Values:
    """Split and parse one ``section.key=value``."""
    dotted, equals, text = override.partition("=")
    section, dot, name = dotted.strip().partition(".")
    origin, text = f"--set {override}: ", text.strip()
    if not equals:
        problems.append(f"{origin}expected section.key=value")
    elif not dot or section not in SECTIONS:
        problems.append(f"{origin}{unknown_section(section, {name: text} if dot else text, KINDS)}")
    elif name not in KINDS[section]:
        problems.append(f"{origin}{unknown_key(section, name, text, KINDS)}")
    else:
        return {(section, name): (_parse(text, KINDS[section][name]), "--set ")}
    return {}


def _parse(text: str, kind: Any) -> object:
    """Read an override's value as TOML, else as text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value: object = parsed["value"]
    if len(parsed) > 1 or (kind is str and not isinstance(value, str)):
        return text
    return value
