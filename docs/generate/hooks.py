"""What MkDocs calls while it builds the site: it adds the pages that are written from the code."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference of commands and configuration to the pages that lie in ``docs/``."""
    from docs.generate import reference
    from longctx.launcher.env import share_cores

    share_cores(processes=1)  # before the modules of commands import torch

    for name, text in (("commands", reference.commands()), ("configuration", reference.configuration())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files
