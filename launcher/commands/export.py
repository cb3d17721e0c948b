"""``longctx export`` writes a run's weights as a directory that ``transformers`` and vLLM read."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longctx.checkpoint.directory import CheckpointDirectory, source_of
from longctx.checkpoint.intact import IntactSteps
from longctx.checkpoint.manifest import Commit
from longctx.checkpoint.restoring import read_plain_state
from longctx.config import Config, ModelConfig
from longctx.config.parsing import parse
from longctx.config.renamed import translated
from longctx.config.sections.model import SOFTMAX_KINDS
from longctx.errors import ConfigError, StorageError, UsageError
from longctx.huggingface.writing.export import Exported, export, refuse_occupied
from longctx.launcher.progress import progress
from longctx.launcher.run_directory import read_config
from longctx.launcher.rundir.records import CHECKPOINTS, CONFIG_FILE, MODEL_SOURCE
from longctx.rules import as_word

DTYPES = ("bfloat16", "float16", "float32", "float64")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx export``."""
    parser.add_argument("--run", required=True, metavar="RUN", help="a run's directory, or one of its checkpoints")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest checkpoint that is intact")
    parser.add_argument("--to", required=True, metavar="DIR", help="the directory to make; it appears when it is whole")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what the run's weights came in, or are kept in")
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="most that a file of weights holds; default: 5GB"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exports one checkpoint."""
    target, shard_bytes = Path(arguments.to), size_of(arguments.shard_size)
    refuse_occupied(target)
    checkpoint, commit = find_checkpoint(Path(arguments.run), arguments.step)
    run_directory = checkpoint.parent.parent
    config = config_of(checkpoint, commit, run_directory)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with progress("longctx: export") as report:
        done = export(
            checkpoint,
            commit,
            _model(config),
            config.data.seq_len,
            run_directory / MODEL_SOURCE,
            target,
            dtype,
            shard_bytes,
            report,
        )
    _tell(checkpoint, target, done)
    return 0


def size_of(text: str) -> int:
    """Reads a size such as 500MB. Raises ``UsageError``."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UsageError(f"--shard-size {text} must be a size such as 5GB, 500MB or 2GiB")
    return size


def find_checkpoint(named: Path, step: int | None) -> tuple[Path, Commit]:
    """Returns the checkpoint that is meant, after all of its files have been hashed."""
    if step is not None and step < 0:
        raise UsageError(f"--step {step} must be the number of a step, at least 0")
    try:
        newest = source_of(str(named))
    except StorageError:
        raise StorageError(
            f"--run {named} holds no committed checkpoint; name a run's directory, or one of its {CHECKPOINTS}/step-N"
        ) from None
    if newest == named and step is not None:
        raise UsageError(f"--run {named} is a checkpoint, and --step {step} names another; leave one out")
    directory = CheckpointDirectory(newest.parent)
    steps = IntactSteps(directory)
    if newest == named:
        step = int(named.name.rpartition("-")[2])
    commit = steps.newest(tell=True) if step is None else steps.exactly(step)
    assert commit is not None, "there is one"
    return directory.path(commit.step), commit


def config_of(checkpoint: Path, commit: Commit, run_directory: Path) -> Config:
    """Returns the configuration that the checkpoint was written under; only its model has to fit."""
    saved: Any = read_plain_state(checkpoint, commit)["config"]
    if not isinstance(saved, dict) or not saved:  # an early version's
        return read_config(run_directory / CONFIG_FILE)
    config = parse(Config, translated(saved))
    config.model.check()
    return config


def _model(config: Config) -> ModelConfig:
    """Returns the model as a function of tokens: a window of all layers belongs to it."""
    model, window = replace(config.model, path=None), config.attention.window
    if window is None:
        return model
    if model.window not in (None, window) or set(model.kinds) - set(SOFTMAX_KINDS):
        raise ConfigError(
            f"attention.window={window} beside model.pattern={model.pattern}, model.window={as_word(model.window)} is "
            "a model that no family of Hugging Face computes"
        )
    return replace(model, pattern="W", window=window, rope_window=type(model.rope_window)())


def _tell(checkpoint: Path, target: Path, done: Exported) -> None:
    for note in done.notes:
        print(f"note: {note}")
    weights = sum(name.endswith(".safetensors") for name in done.files)
    print(
        f"{checkpoint} -> {target}: {done.architecture}, {done.tensors} tensors, {done.bytes / 1e9:.3f} GB in "
        f"{weights} {'file' if weights == 1 else 'files'}, {done.dtype}"
    )
