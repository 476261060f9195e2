"""Argument parsing whose complaints are `UsageError`s that name the nearest known word."""

import argparse
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

from hpcpipe.errors import UsageError


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps descriptions that have lines of their own, and breaks those of one line to the width of the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        laid_out = "\n" in text
        return super()._fill_text(text, width, indent) if laid_out else fill(text, width)


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` for exit code 64: no abbreviated options, errors are raised, not printed."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print.

        Parameters
        ----------
        message : str
            argparse's sentence.

        Raises
        ------
        UsageError
            Always.
        """
        unknown = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        if unknown:
            hint = nearest(unknown[1], self._option_string_actions)
            message = f"unknown option {unknown[1]}; {hint or f'options are listed by `{self.prog} --help`'}"
            raise UsageError(message)
        choice = re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            hint = nearest(choice[2], re.findall(r"[\w-]+", choice[3]))
            message = f"{choice[1]} {choice[2]!r}: {hint or f'choose from {choice[3]}'}"
        raise UsageError(f"{message}\n{self.format_usage().strip()}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse unknown options here, where the verb's own options are known.

        Parameters
        ----------
        args, namespace
            As for argparse.

        Returns
        -------
        tuple
            The namespace and an empty list.

        Raises
        ------
        UsageError
            The arguments are wrong.
        """
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return known, rest


def path(text: str) -> Path:
    """Convert an argument to a path.

    Parameters
    ----------
    text : str
        What was written.

    Returns
    -------
    Path
        Its path.

    Raises
    ------
    ArgumentTypeError
        It is empty, as an unset variable of a shell: `Path` would take it for the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError('an empty path: name a file or folder; "." is the current one')
    return Path(text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" for a misspelt word.

    Parameters
    ----------
    word : str
        What was written.
    known : iterable of str
        What could have been meant.

    Returns
    -------
    str
        A question, or "" where nothing is near.
    """
    close = get_close_matches(word.lower(), list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""
