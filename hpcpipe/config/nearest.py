"""What to say about a section or key that does not exist: the nearest one that does."""

from collections.abc import Mapping
from difflib import get_close_matches

from hpcpipe.config.values import as_toml

Known = Mapping[str, Mapping[str, object]]


def unknown_section(section: str, value: object, known: Known) -> str:
    """Say that a section does not exist, and which one was probably meant.

    Parameters
    ----------
    section : str
        The unknown name.
    value : object
        What stands there: a table, or the value of a key that stands outside every section.
    known : mapping
        section -> key -> anything.

    Returns
    -------
    str
        One sentence for an error message.
    """
    if not isinstance(value, dict):
        where = _sections_with(section, known) or _nearest_anywhere(section, known)
        cure = f"did you mean {' or '.join(where)}?" if where else f"sections are {', '.join(known)}"
        return f"{section} = {as_toml(value)} stands outside every section; {cure}"
    close = get_close_matches(_plain(section), known, n=1)
    cure = f"did you mean [{close[0]}]?" if close else f"sections are {', '.join(known)}"
    return f"unknown section [{section}]; {cure}"


def unknown_key(section: str, name: str, value: object, known: Known) -> str:
    """Say that a key does not exist in its section, and which one was probably meant.

    Parameters
    ----------
    section : str
        A section that exists.
    name : str
        The unknown key.
    value : object
        Its value, for the message.
    known : mapping
        section -> key -> anything.

    Returns
    -------
    str
        One sentence for an error message.
    """
    elsewhere = [] if _plain(name) in known[section] else _sections_with(name, known)
    close = get_close_matches(_plain(name), known[section], n=1)
    if elsewhere:
        cure = f"this key is in another section: {' or '.join(elsewhere)}"
    elif close:
        cure = f"did you mean {section}.{close[0]}?"
    else:
        far = _nearest_anywhere(name, known)
        cure = f"did you mean {far[0]}?" if far else f"keys of [{section}] are {', '.join(known[section])}"
    return f"unknown key {section}.{name} = {as_toml(value)}; {cure}"


def _plain(name: str) -> str:
    """Write a name as keys are written, so that case and dashes do not count as differences."""
    return name.lower().replace("-", "_")


def _sections_with(name: str, known: Known) -> list[str]:
    """Return every section.key whose key is this name."""
    return [f"{section}.{key}" for section, keys in known.items() for key in keys if key == _plain(name)]


def _nearest_anywhere(name: str, known: Known) -> list[str]:
    """Return at most one section.key with a similar key."""
    dotted = {key: f"{section}.{key}" for section, keys in known.items() for key in keys}
    return [dotted[key] for key in get_close_matches(_plain(name), dotted, n=1)]
