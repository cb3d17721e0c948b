"""Keeps a run's tokenizer in its directory, and refuses to go on with another one before any text is tokenized."""

from __future__ import annotations

import shutil
from pathlib import Path

from longctx.config import Config
from longctx.data.tokenizer import BYTES, open_tokenizer
from longctx.data.tokenizing.cached import policy_of
from longctx.data.tokenizing.definition import CARRIED, GENERATION, TOKENIZER_FILE, find_file
from longctx.errors import ConfigError, StorageError
from longctx.launcher.run_directory import directory_of, read_config
from longctx.launcher.rundir.records import CONFIG_FILE, TOKENIZER


def keep_tokenizer(config: Config, directory: Path) -> None:
    """Copies the files of ``data.tokenizer`` into the run, for generation, for exports, and for its own resumption."""
    if config.data.tokenizer in (None, BYTES):
        return
    source, target = find_file(str(config.data.tokenizer)), directory / TOKENIZER
    try:
        target.mkdir(mode=0o700)
        shutil.copyfile(source, target / TOKENIZER_FILE)
        for name in {*CARRIED, GENERATION} - {TOKENIZER_FILE}:
            if source.with_name(name).is_file():
                shutil.copyfile(source.with_name(name), target / name)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror or error}") from error


def require_same_tokenizer(config: Config) -> None:
    """Refuses another tokenizer than the one that the run was trained with. Raises ``ConfigError`` naming both."""
    directory = directory_of(config)
    kept, before = directory / TOKENIZER, directory / CONFIG_FILE
    if not before.is_file():
        return
    was = read_config(before).data
    if was.source != config.data.source:
        return  # whether their tokens are the same, the checkpoint will tell
    if was.tokenizer is not None and not (kept / TOKENIZER_FILE).is_file():
        return  # of an earlier attempt; the checkpoint itself knows
    trained = open_tokenizer(kept if was.tokenizer is not None else None, policy_of(was))
    now = open_tokenizer(config.data.tokenizer, policy_of(config.data))
    if trained.digest != now.digest:
        raise ConfigError(
            f"data.tokenizer: {now.digest} ({config.data.tokenizer or BYTES}) is not the one of the run, "
            f"{trained.digest} ({'bytes' if was.tokenizer is None else kept}): the same ids would be other text; leave "
            "data.tokenizer, data.bos, data.eos and data.special_tokens as they were, or start a new run by init.from"
        )
