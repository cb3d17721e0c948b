"""Records what a run ran on: versions, commit, hardware, data and the canary's verdict, in ``environment.json``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import longctx
from longctx.errors import StorageError

PACKAGES = ("torch", "numpy", "safetensors", "triton", "flash-attn")


def write_environment(
    directory: Path, canary: dict[str, Any] | None, data: dict[str, Any], run: dict[str, Any]
) -> None:
    """Writes ``environment.json``.

    ``canary``: its verdict, None when off. ``data``: what the run is trained on. ``run``: what it says of itself.

    No environment variables: they may hold secrets.
    """
    unfinished = directory / ".environment.json.new"
    text = json.dumps({**describe(), "data": data, "canary": canary, "run": run}, indent=2)
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(directory / "environment.json")
    except OSError as error:
        raise StorageError(f"{directory}/environment.json cannot be written: {error.strerror or error}") from None


def describe() -> dict[str, Any]:
    """Describes versions, commit and hardware as plain JSON values; None where there is nothing to say."""
    return {
        "longctx": longctx.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "working_directory": str(Path.cwd()),
        "cuda": torch.version.cuda,
        "git_commit": _git_commit(Path(longctx.__file__).resolve().parent),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(package: Path) -> str | None:
    """Returns the commit that the package's files come from, "+changes" behind it when they differ from it.

    None for an installed package, even where its environment lies inside a checkout of something else.
    """
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        changes = _git(package, "status", "--porcelain", "--untracked-files=no")
        return _git(package, "rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(package: Path, *arguments: str) -> str:
    command = ["git", "-C", str(package), *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout.strip()


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
