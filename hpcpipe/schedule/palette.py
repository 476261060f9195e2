"""The colours of pictures: one per kind, a lighter shade for each further chunk of a rank."""

from collections.abc import Sequence

from hpcpipe.schedule.action import Kind

NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}
"""What the kinds are called in a legend, in the order of the legend."""

_BASE = {Kind.F: (0x2F, 0x6D, 0xB5), Kind.B: (0x2E, 0x8B, 0x6B), Kind.I: (0xBC, 0x5E, 0x22), Kind.W: (0x8A, 0x55, 0x9E)}
_LIGHTEST = 0.55
_DARK_INK, _LIGHT_INK = (0x14, 0x20, 0x2E), (0xFF, 0xFF, 0xFF)
# Above this luminance of the background the dark ink has the better contrast.
_MIDDLE = 0.21


def colours(kind: Kind, chunk: int, num_chunks: int) -> tuple[str, str]:
    """Return the background and the text colour of an action, as ``#rrggbb``.

    Parameters
    ----------
    kind : Kind
        A compute kind.
    chunk, num_chunks : int
        Which of a rank's stages it belongs to, in ascending order, and how many those are.
    """
    share = _LIGHTEST * chunk / (num_chunks - 1) if num_chunks > 1 else 0.0
    background = [round(part + (255 - part) * share) for part in _BASE[kind]]
    return _hex(background), _hex(_DARK_INK if _luminance(background) > _MIDDLE else _LIGHT_INK)


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _luminance(colour: Sequence[int]) -> float:
    """Return the relative luminance of a colour (WCAG 2.2)."""
    linear = [(part / 255 / 12.92) if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
