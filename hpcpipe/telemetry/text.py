"""Text for a terminal: numbers of things, and what comes from files and models, made safe."""


def visible(text: str, kept: str = "") -> str:
    r"""Escape what a terminal cannot show or would obey, as file names and generated text may hold anything.

    Parameters
    ----------
    text : str
        Any text, also with lone surrogates.
    kept : str
        Control characters that stay as they are.

    Returns
    -------
    str
        With escapes such as ``\x1b`` in their place.
    """
    return "".join(letter if letter.isprintable() or letter in kept else ascii(letter)[1:-1] for letter in text)


def count(number: int, thing: str) -> str:
    """Return a number of things in words, such as ``no spare``, ``1 spare`` or ``2 spares``."""
    return f"{number or 'no'} {thing}{'s' * (number > 1)}"
