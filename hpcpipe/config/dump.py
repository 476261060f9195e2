"""Writing a configuration: as TOML with its documentation, and as plain dictionaries."""

from dataclasses import asdict, fields
from typing import Any

from hpcpipe.config.schema import Config, documented_keys
from hpcpipe.config.values import as_toml


def to_toml(config: Config) -> str:
    """Write every key, each with its documentation as a comment above it.

    Parameters
    ----------
    config : Config
        The configuration, usually a resolved one.

    Returns
    -------
    str
        TOML text which `hpcpipe.config.load.load` reads back to an equal configuration.
    """
    docs = documented_keys()
    blocks = []
    for section in fields(config):
        lines = [f"[{section.name}]"]
        for name, value in vars(getattr(config, section.name)).items():
            lines += [f"# {docs[f'{section.name}.{name}']}", f"{name} = {as_toml(value)}"]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return section -> key -> value with lists for tuples, ready for ``json``."""
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in keys.items()}
        for section, keys in asdict(config).items()
    }
