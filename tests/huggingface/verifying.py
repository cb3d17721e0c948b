"""``longctx verify --hf`` of a case's directory, which is saved once in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.launcher import cli
from tests.huggingface.small_models import saved


def directory_of(name: str, folder: Path) -> Path:
    path = folder / name.replace(" ", "-")
    return path if path.exists() else saved(name, folder)


def verify(capsys: pytest.CaptureFixture[str], directory: Path, *words: str) -> tuple[int, dict[str, Any]]:
    status = cli.main(["verify", "--hf", str(directory), "--json", "comm=sim", *words])
    return status, json.loads(capsys.readouterr().out)
