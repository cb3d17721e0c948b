"""Writes the tensors of a check, as safetensors that anyone can read."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from longctx.errors import StorageError


def require_writable(*files: Path | None) -> None:
    """Refuses files that could not be written, before any work."""
    for file in files:
        if file and (file.is_dir() or not file.parent.is_dir()):
            raise StorageError(f"{file} can't be written: it must be a file in a folder that exists")
        # safetensors renames a new file over the old one: a device node would be gone.
        if file and ((file.exists() and not file.is_file()) or not os.access(file.parent, os.W_OK)):
            raise StorageError(f"{file} can't be written: it must be a regular file in a writable folder")


def dump(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes the tensors into one file."""
    try:
        save_file({name: whole.contiguous() for name, whole in tensors.items()}, file)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{file} can't be written: {error}") from error
