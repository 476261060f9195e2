"""Text from files and models, made safe for a terminal."""


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
