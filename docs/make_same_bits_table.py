"""Write the tables of docs/numerics.md: ``python docs/make_same_bits_table.py``."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "numerics.md"
sys.path.append(str(DOCS.parent / "tests"))

from support.schedule_cells import PIPELINES, VARIANTS, Variant, legal_counts, microbatch_counts, refusal  # noqa: E402

_BEGIN, _END = "<!-- same bits -->\n", "<!-- end same bits -->\n"


def tables() -> str:
    """Return the Markdown tables of the cells that give the same bits, and of those that are not defined."""
    ranks = ["1 rank", *(f"{pipeline} ranks" for pipeline in PIPELINES[1:])]
    defined = [["schedule", "stages per rank", *ranks], ["---", "--:", *["---"] * len(ranks)]]
    for variant in VARIANTS:
        cells = [", ".join(map(str, legal_counts(variant, pipeline))) for pipeline in PIPELINES]
        defined.append([f"`{variant.name}`", str(variant.chunks), *cells])
    refused = [["schedule", "stages per rank", "ranks", "microbatches", "reason"], ["---", "--:", "--:", "---", "---"]]
    for name in dict.fromkeys(variant.name for variant in VARIANTS):
        refused += _refused([variant for variant in VARIANTS if variant.name == name])
    return f"{_table(defined)}\nNot defined:\n\n{_table(refused)}"


def page(text: str) -> str:
    """Return the text of the page with its tables made anew.

    Parameters
    ----------
    text : str
        The page as it is; the tables stand between two comments.
    """
    pattern = re.compile(f"({re.escape(_BEGIN)}).*?({re.escape(_END)})", re.DOTALL)
    text, found = pattern.subn(lambda match: f"{match[1]}\n{tables()}\n{match[2]}", text)
    if found != 1:
        raise SystemExit(f"{PAGE}: expected the tables between {_BEGIN.strip()} and {_END.strip()}")
    return text


def _refused(variants: list[Variant]) -> list[list[str]]:
    """Return the rows of one schedule's cells that are refused; stages per rank make no difference to the reason."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for pipeline in PIPELINES:
        for variant in variants:
            reasons = {m: refusal(variant, pipeline, m) for m in microbatch_counts(pipeline)}
            counts = [m for m, reason in reasons.items() if reason]
            if counts:
                # Before the colon stands the row's own number; after it the cure, the same for all of them.
                row = (str(pipeline), ", ".join(map(str, counts)), str(reasons[counts[-1]]))
                rows.setdefault(row, []).append(variant.chunks)
    return [[f"`{variants[0].name}`", ", ".join(map(str, chunks)), *row] for row, chunks in rows.items()]


def _table(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
