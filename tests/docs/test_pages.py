"""The pages agree with the code: names, paths, figures and drawings; and they keep the house's rules of style."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.tables import volume
from docs.generate import drawings, reference
from longctx.catalog import LINEAR_STRATEGIES, MIXERS, STRATEGIES
from longctx.config import Config
from longctx.config.parsing import dotted_paths
from longctx.launcher.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "longctx"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
SHORT = ("exactness", "parity", "volume")  # whose whole tables `make matrix` writes


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./]+/[\w.]*(?:\.py|\.md|\.yaml|\.toml|/))`", text))
    made = tuple(name for name in named if name.startswith(("runs/", "build/")))
    assert not [name for name in named.difference(made) if not any((top / name).exists() for top in (ROOT, PACKAGE))]


def test_the_pages_of_measured_tables_are_short():
    for name in SHORT:
        page = text_of(f"{name}.md")
        assert len(page.splitlines()) <= 40
        assert (
            "**Claim.**" in page
            and f"build/matrix/{name}.md" in page
            and re.search(
                r"\d (January|February|March|April|May|June|July|August|September|October|November|December) 20\d\d",
                page,
            )
        )


def test_the_page_of_volumes_has_the_worst_figures_of_the_closed_forms():
    assert "\n".join(volume.worst()) in text_of("volume.md"), "run `python -m benchmarks.tables.volume`"


def test_the_whole_table_of_volumes_still_builds(tmp_path):
    assert volume.main([str(tmp_path / "volume.md")]) == 0
    page = (tmp_path / "volume.md").read_text(encoding="utf-8")
    for world in volume.WORLDS:
        assert f"## {world} ranks" in page


def test_the_page_of_exactness_and_the_strategies_page_have_every_strategy():
    exactness, strategies, linear = text_of("exactness.md"), text_of("strategies.md"), text_of("linear.md")
    for name in STRATEGIES:
        assert f"| `{name}` |" in exactness
        assert re.search(rf"^## .*`{name}`", strategies, re.MULTILINE), name
    for name in LINEAR_STRATEGIES:
        assert f"| `{name}`, " in exactness and f"`{name}`" in linear
    for name in MIXERS:
        assert f"`{name}`" in linear


def test_the_reference_has_every_command_and_key():
    commands, configuration = reference.commands(), reference.configuration()
    for command in COMMANDS:
        assert f"## longctx {command.name}\n" in commands
    paths = dotted_paths(Config)
    for path in paths:
        is_section = any(other.startswith(f"{path}.") for other in paths)
        assert (f"# {path}\n" if is_section else f"| `{path}` |") in configuration


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_what_its_script_draws(name):
    file = drawings.FOLDER / f"{name}.svg"
    assert file.read_text(encoding="utf-8") == drawings.DRAWINGS[name](), "run `make docs`"


def test_every_drawing_is_shown():
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for file in drawings.FOLDER.glob("*.svg"):
        assert f"drawings/{file.name})" in shown, file.name


def test_readme_has_short_paragraphs_and_sentences():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip().splitlines()
        if not lines or lines[0].startswith(("|", "#", "!")):
            continue
        assert len(lines) <= 3 or lines[0].startswith("- "), paragraph
        plain = re.sub(r"\]\([^)]*\)|[*\[\]]", "", re.sub(r"`[^`]*`", "code", paragraph))
        for sentence in re.split(r"(?<=[.:;!?])\s|\n- ", plain):
            assert len(sentence.split()) <= 25, sentence


def test_a_line_of_the_glossary_has_under_fifteen_words():
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \|", text_of("glossary.md"), re.MULTILINE)
    assert {"baton", "ledger", "canary", "tile", "partial", "halo", "hop", "lap"} <= {name for name, _ in rows}
    for name, meaning in rows:
        assert len(meaning.split()) < 15, name
