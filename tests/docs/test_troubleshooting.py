"""The messages that the page of troubles quotes are those of the code."""

import ast
import re
from pathlib import Path

from tests.architecture.source_tree import modules

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
GAP = "…"


def texts(tree: ast.AST) -> set[str]:
    """All texts of a module, with a gap where one is filled in."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def quoted() -> list[str]:
    rows = re.findall(r"^\| `(.+?)` \| .+ \| .+ \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 15
    return rows


def test_every_message_stands_in_the_code():
    code = "\n\0".join(text for module in modules() for text in texts(module.tree))
    missing = []
    for message in quoted():
        pattern = r"[^\0]*".join(re.escape(part) for part in message.split(GAP))
        if not re.search(pattern, code):
            missing.append(message)
    assert not missing


def test_a_message_that_nobody_writes_would_be_seen():
    assert GAP.join(["cannot read ", ": ", "; it must exist and be readable"]) in texts(
        ast.parse('f"cannot read {a}: {b}; it must " "exist and be readable"')
    )
    assert not any("no such words are anywhere" in text for module in modules() for text in texts(module.tree))
