"""The site builds from the checkout alone, and its pages ask no other machine for anything."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_it_fetches_nothing(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//", text), page
        assert not re.search(r"<link[^>]+rel=\"(?:stylesheet|preconnect|icon)\"[^>]+href=\"(?:https?:)?//", text), page


def test_its_reference_is_written_from_the_code(site):
    library = (site / "reference/library.html").read_text(encoding="utf-8")
    for name in ("StrategyAttention", "LinearAttention", "shard", "Cluster", "Documents", "Decoder"):
        assert f"{name}</span>" in library, name
    assert "parallel.pp_schedule" in (site / "reference/configuration.html").read_text(encoding="utf-8")
    assert "longctx submit" in (site / "reference/commands.html").read_text(encoding="utf-8")
