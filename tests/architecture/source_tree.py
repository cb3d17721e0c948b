"""The package's own source and its benchmarks, parsed: what the tests of this folder read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "longctx"
BENCHMARKS = ROOT / "benchmarks"


@dataclass(frozen=True)
class Module:
    """One source file under its dotted name."""

    name: str  # longctx.attention.strategies.ring; a package's __init__ has the package's name
    path: Path
    tree: ast.Module
    lines: int

    @property
    def unit(self) -> str:
        """The top-level part that the module belongs to, such as ``attention``, or ``benchmarks``."""
        parts = self.name.split(".")
        if parts[0] == BENCHMARKS.name:
            return parts[0]
        return parts[1] if len(parts) > 1 else ""

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    target: str
    line: int
    at_start: bool  # runs when the module is imported, not inside a function or for type checkers only


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package; the symlinked outer folders count under their names in it."""
    found = []
    for entry in sorted(PACKAGE.iterdir()):
        files = [entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py"))
        found += [_parsed(file) for file in files]
    return tuple(found)


@cache
def with_benchmarks() -> tuple[Module, ...]:
    """Every module of the package, and of the benchmarks beside it."""
    return (*modules(), *map(_parsed, sorted(BENCHMARKS.rglob("*.py"))))


def _parsed(file: Path) -> Module:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    text = file.read_text(encoding="utf-8")
    return Module(".".join(parts), file, ast.parse(text, str(file)), len(text.splitlines()))


def names() -> frozenset[str]:
    return frozenset(module.name for module in modules())


def imports(module: Module, root: str = "longctx") -> Iterator[Import]:
    """Every import of modules under ``root`` in ``module``, wherever it stands."""
    deferred = {
        id(child)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _for_type_checkers(node)
        for child in ast.walk(node)
    }
    for node in ast.walk(module.tree):
        for target in _targets(node):
            if target.split(".")[0] == root:
                yield Import(target, node.lineno, id(node) not in deferred)  # type: ignore[attr-defined]


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import at line {node.lineno}"
        base = node.module or ""
        # `from longctx.launcher import env` names a module, `from longctx.config import Config` does not.
        return [f"{base}.{a.name}" if f"{base}.{a.name}" in names() else base for a in node.names]
    return []


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
