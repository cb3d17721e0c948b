"""The language that readers meet: one name for one thing, first lines that read alone, metaphors in the glossary."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT, Module, modules

# Words that continue a sentence which the reader does not see.
CONTINUATIONS = (
    "Of", "By", "Where", "As", "Back", "Around", "To", "Likewise", "Those", "And", "But", "Beside", "Also", "The same",
    "Its", "Their", "With", "From", "For",
)  # fmt: skip
MOST_WORDS = 30

METAPHORS = ("baton", "ledger", "canary", "tile", "partial", "halo", "hop", "lap")
GLOSSARY = ROOT / "docs" / "glossary.md"
MOST_GLOSSARY_WORDS = 14

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def benchmarks() -> list[Module]:
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found.append(Module(name, file, ast.parse(text, str(file)), len(text.splitlines())))
    return found


def public(tree: ast.AST, outer: str = "") -> Iterator[tuple[Definition, str]]:
    """Yields classes and functions that no name on the way to them hides, methods included."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, Definition):
            yield from public(node, outer)
        elif not node.name.startswith("_"):
            yield node, outer + node.name
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{outer}{node.name}.")


def docstrings(module: Module) -> Iterator[tuple[int, str, str]]:
    """Yields line, name and text of each public docstring of a module, its own first."""
    text = ast.get_docstring(module.tree)
    if text:
        yield 1, module.name, text
    for node, name in public(module.tree):
        text = ast.get_docstring(node)
        if text:
            yield node.lineno, name, text


def fault_of(docstring: str) -> str | None:
    """Returns what keeps a docstring's first line from reading alone, None where nothing does."""
    line = docstring.splitlines()[0]
    if not re.match(r"[A-Z0-9]|``", line):
        return "starts with neither a capital letter, a digit nor a code literal"
    for word in CONTINUATIONS:
        if re.match(rf"{word}\b", line):
            return f"starts with {word!r}, which needs a sentence before it"
    if not re.search(r"[.:?]$", line):
        return "ends within a sentence; say less in it, the rest after an empty line"
    words = re.findall(r"``[^`]+``|[^\s]*\w[^\s]*", line)
    return f"has {len(words)} words; at most {MOST_WORDS} read well" if len(words) > MOST_WORDS else None


def test_no_two_public_classes_share_a_name():
    places = defaultdict(list)
    for module in (*modules(), *benchmarks()):
        for node, name in public(module.tree):
            if isinstance(node, ast.ClassDef):
                places[name.rpartition(".")[2]].append(f"{module.where}:{node.lineno}")
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert not shared, "\n" + "\n".join(f"{name}: {', '.join(found)}" for name, found in shared.items())


def test_first_lines_of_public_docstrings_read_alone():
    faults = [
        f"{module.where}:{line} {name} {fault}"
        for module in (*modules(), *benchmarks())
        for line, name, text in docstrings(module)
        if (fault := fault_of(text)) is not None
    ]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("line", "holds"),
    [
        ("Returns the rows that a rank sends.", True),
        ("``longctx train``: one process of the trainer.", True),
        ("8 bytes that name the format.", True),
        ("Of swaps around whole sequences.", False),
        ("The same on every rank.", False),
        ("rows of a rank, which it sends.", False),
        ("Returns the rows that a rank sends to the ranks which", False),
        (f"Returns {'very ' * 40}much.", False),
    ],
)
def test_the_check_of_first_lines_sees_what_it_forbids(line, holds):
    assert (fault_of(line) is None) == holds


def glossary_line(word: str, glossary: Path) -> str:
    rows = [line for line in glossary.read_text(encoding="utf-8").splitlines() if re.search(rf"\*\*{word}\*\*", line)]
    assert len(rows) == 1, f"{glossary.name} has {len(rows)} lines that explain **{word}**; a metaphor has one"
    return rows[0]


@pytest.mark.parametrize("word", METAPHORS)
def test_metaphors_have_a_short_line_in_the_glossary(word):
    meaning = re.sub(rf"\W*\*\*{word}\*\*\W*", "", glossary_line(word, GLOSSARY), count=1)
    words = re.findall(r"\w[\w'−-]*", meaning)
    assert 0 < len(words) <= MOST_GLOSSARY_WORDS, f"{word}: {meaning!r} has {len(words)} words"
