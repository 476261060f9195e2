"""Reads the tables of the seeds notes, and lists what in them does not hold."""

import ast
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

STATUSES = ("met", "partly", "planned", "simulated only", "out of reach here", "not checkable")
PROVEN = ("met", "partly", "simulated only")
"""Statuses that need a place and a proof."""

COLUMNS = ["id", "claim", "figure", "status", "where it is met", "proof"]
IDENTIFIER = re.compile(r"[A-Z]\d+")
NAMED = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Claim:
    """One row of a note's table."""

    note: str
    id: str
    claim: str
    figure: str
    status: str
    where: str
    proof: str


def read_notes(folder: Path) -> dict[str, list[Claim]]:
    """Read note -> rows, in the order of the files' names."""
    return {
        path.name: [Claim(path.name, *row) for row in table_rows(path.read_text())]
        for path in sorted(folder.glob("*.md"))
        if path.name != "README.md"
    }


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of every row below the table's head; ValueError where a table has other columns."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    if not rows or rows[0] != COLUMNS:
        raise ValueError(f"the table's columns must be {COLUMNS}")
    uneven = [row for row in rows if len(row) != len(COLUMNS)]
    if uneven:
        raise ValueError(f"rows with other than {len(COLUMNS)} cells: {uneven}")
    return rows[2:]


def problems(root: Path, claims: list[Claim]) -> list[str]:
    """List claims with an unknown status, without a needed proof, or naming what does not exist."""
    found = []
    for number, claim in enumerate(claims, 1):
        place = f"{claim.note} {claim.id}"
        if claim.id != f"{claim.note[0].upper()}{number}":
            found.append(f"{place}: expected {claim.note[0].upper()}{number}")
        if not claim.claim:
            found.append(f"{place}: no claim")
        if claim.status not in STATUSES:
            found.append(f"{place}: unknown status {claim.status!r}")
        named = NAMED.findall(claim.where)
        proofs = NAMED.findall(claim.proof)
        if claim.status in PROVEN and not (named and proofs):
            found.append(f"{place}: {claim.status} needs a place and a proof, each in backticks")
        if claim.proof and not proofs:
            found.append(f"{place}: the proof names nothing in backticks")
        found += [f"{place}: {name} does not exist" for name in [*named, *proofs] if not exists(root, name)]
    return found


def exists(root: Path, name: str) -> bool:
    """Tell whether a dotted module, a path, or a ``path::test`` exists in the tree."""
    path, _, test = name.partition("::")
    if test:
        return (root / path).is_file() and test in function_names(root / path)
    if re.fullmatch(r"hpcpipe(\.\w+)+", name):
        base = root / Path(*name.split("."))
        return base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()
    return (root / path).exists()


def function_names(path: Path) -> set[str]:
    """Return the names of the functions that a file defines at its top."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def index(notes: dict[str, list[Claim]]) -> str:
    """Write the table of counts for the README: one row per note, one column per status."""
    lines = [
        "| note | claims | " + " | ".join(STATUSES) + " |",
        "|---|" + "---|" * (len(STATUSES) + 1),
    ]
    total: Counter[str] = Counter()
    for note, claims in notes.items():
        counts = Counter(claim.status for claim in claims)
        total += counts
        lines.append(_index_row(f"[{note}]({note})", counts))
    return "\n".join([*lines, _index_row("all", total)])


def _index_row(name: str, counts: Counter[str]) -> str:
    cells = [name, counts.total(), *(counts[status] for status in STATUSES)]
    return "| " + " | ".join(map(str, cells)) + " |"
