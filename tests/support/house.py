"""Reads the package's syntax trees and lists what breaks the rules of the house."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FLOORS = (
    ("errors",),
    ("config", "cluster", "faults"),
    ("mpi", "kernels", "schedule", "telemetry", "watch"),
    ("model", "memory", "data", "optim"),
    ("pipeline", "checkpoint", "recovery"),
    ("train",),
    ("bench", "chaos"),
    ("cli",),
    ("__main__",),
)
"""Rooms from the ground up; a room imports from the floors below its own only."""

FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}

DOORS = {
    "numpy": None,
    "mpi4py": ("mpi",),
    "numba": ("kernels",),
    "scipy": ("kernels",),
    "llvmlite": ("kernels",),
    "h5py": ("checkpoint", "data"),
    "blake3": ("checkpoint",),
    "rich": ("telemetry", "cli"),
}
"""Outside libraries and the rooms that may import them; None: all."""

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80

TALKING_ROOMS = ("cli", "telemetry")
SLURM_MODULE = "hpcpipe/cluster/slurm.py"
SLURM_VARIABLE = re.compile(r"SLURM_[A-Z_]*")


@dataclass(frozen=True)
class Module:
    """One source file.

    Attributes
    ----------
    path : str
        From the root of the tree, ``hpcpipe/room/file.py``.
    text : str
        Its source.
    """

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def room(self) -> str:
        """The room, ``__init__`` for the package itself."""
        parts = Path(self.path).with_suffix("").parts
        return parts[1]

    @cached_property
    def package(self) -> list[str]:
        """Names of the package that relative imports start from."""
        return list(Path(self.path).parent.parts)

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def imports(self) -> Iterator[tuple[int, str]]:
        """Give (line, dotted name) of everything imported, at any depth; ``from a import b`` gives ``a.b``."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self.package[: len(self.package) + 1 - node.level] if node.level else []
                base += [node.module] if node.module else []
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
            elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
                name = node.args[0] if node.args else None
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    yield node.lineno, name.value


def read_package(root: Path) -> list[Module]:
    """Read every module below ``root/hpcpipe``."""
    return [
        Module(path.relative_to(root).as_posix(), path.read_text()) for path in sorted((root / "hpcpipe").rglob("*.py"))
    ]


def floors(modules: list[Module]) -> list[str]:
    """List imports that go up, or sideways into another room of the same floor."""
    problems = []
    for module in modules:
        for line, name in module.imports():
            parts = name.split(".")
            if parts[0] != "hpcpipe" or len(parts) == 1 or parts[1].startswith("__version"):
                continue
            target = parts[1]
            if target not in FLOOR_OF:
                problems.append(f"{module.path}:{line}: {name} is in no room")
            elif module.room != target and FLOOR_OF[target] >= FLOOR_OF.get(module.room, -1):
                problems.append(f"{module.path}:{line}: {module.room} must not import {target}")
            elif module.room == "schedule" and target not in ("schedule", "errors"):
                problems.append(f"{module.path}:{line}: schedule imports only errors, not {target}")
    return list(dict.fromkeys(problems))


def rooms(modules: list[Module]) -> list[str]:
    """List modules that stand in no known room."""
    return [
        f"{module.path}: {module.room} is on no floor"
        for module in modules
        if module.room not in FLOOR_OF and module.path != "hpcpipe/__init__.py"
    ]


def doors(modules: list[Module]) -> list[str]:
    """List imports of outside libraries from rooms that have no door to them."""
    problems = []
    for module in modules:
        for line, name in module.imports():
            library = name.split(".")[0]
            if library == "hpcpipe" or library in sys.stdlib_module_names:
                continue
            allowed = DOORS.get(library, ())
            if allowed is not None and module.room not in allowed:
                problems.append(f"{module.path}:{line}: {module.room} has no door to {library}")
    return problems


def slurm_variables(modules: list[Module]) -> list[str]:
    """List names of Slurm's variables outside the one module that reads them."""
    return [
        f"{module.path}:{node.lineno}: {node.value}"
        for module in modules
        if module.path != SLURM_MODULE
        for node in module.nodes(ast.Constant)
        if isinstance(node.value, str) and SLURM_VARIABLE.fullmatch(node.value)
    ]


def world_communicators(modules: list[Module]) -> list[str]:
    """List uses of the world communicator beyond the one in the room of MPI."""
    uses = [
        (module, f"{module.path}:{node.lineno}: COMM_WORLD")
        for module in modules
        for node in module.nodes(ast.Attribute, ast.Name, ast.alias)
        if "COMM_WORLD" in (getattr(node, "attr", ""), getattr(node, "id", ""), getattr(node, "name", ""))
    ]
    inside = [use for module, use in uses if module.room == "mpi"]
    return [use for module, use in uses if module.room != "mpi"] + (inside if len(inside) > 1 else [])


def printing(modules: list[Module]) -> list[str]:
    """List calls of print outside the rooms that talk to people."""
    return [
        f"{module.path}:{node.lineno}: print"
        for module in modules
        if module.room not in TALKING_ROOMS
        for node in module.nodes(ast.Call)
        if _called(node) == "print" and isinstance(node.func, ast.Name)
    ]


def docstrings(modules: list[Module]) -> list[str]:
    """List modules that do not say what they are for."""
    return [f"{module.path}: no docstring" for module in modules if not ast.get_docstring(module.tree)]


def lengths(modules: list[Module]) -> list[str]:
    """List modules and functions that are too long to be read in one go."""
    problems = []
    for module in modules:
        num_lines = len(module.text.splitlines())
        if num_lines > MAX_MODULE_LINES:
            problems.append(f"{module.path}: {num_lines} lines, at most {MAX_MODULE_LINES}")
        for node in module.nodes(ast.FunctionDef, ast.AsyncFunctionDef):
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                problems.append(f"{module.path}: {node.name}: {num_lines} lines, at most {MAX_FUNCTION_LINES}")
    return problems


def _called(node: ast.Call) -> str:
    """Return the last name of what is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


RULES: tuple[Callable[[list[Module]], list[str]], ...] = (
    rooms,
    floors,
    doors,
    slurm_variables,
    world_communicators,
    printing,
    docstrings,
    lengths,
)
