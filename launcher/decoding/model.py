"""Finds what ``longctx generate`` runs: configuration, weights, tokenizer and stop ids, with every refusal first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longctx.config import Config, resolve, simulated_world_size
from longctx.config.sections import DataConfig, ParallelConfig
from longctx.data.tokenizer import ByteTokenizer, Tokenizer
from longctx.errors import ConfigError, UsageError
from longctx.evaluate import require_remembered
from longctx.huggingface.config_in import model_fields
from longctx.launcher import build, machine
from longctx.launcher.commands.export import config_of, find_checkpoint
from longctx.launcher.compose import compose_mapping
from longctx.launcher.decoding.text import stop_ids_in, tokenizer_in
from longctx.launcher.hydra.overrides import quoted
from longctx.launcher.rundir.records import MODEL_SOURCE
from longctx.launcher.verify.directory import fitting_rows

READ = ("comm", "parallel", "attention", "data.seq_len", "train.dtype", "train.mlp_chunk", "train.deterministic")
_ROPE = ("model.rope", "model.rope_window", "model.rope_theta")
_OF_BYTES = ("python_stdlib", "text")  # sources whose ids are bytes where no tokenizer is named


@dataclass(frozen=True)
class ServedModel:
    """Says what is run: ``config`` is not resolved yet. ``checkpoint``: None for the weights of ``model.path``."""

    config: Config
    checkpoint: Path | None
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    seq_len: int | None  # the declared length; None: that of prompt and new tokens


def from_directory(directory: Path, overrides: list[str]) -> ServedModel:
    """Reads what a directory of Hugging Face says; ``config`` has a length of its own only where the user set one."""
    _refuse_others(overrides)
    model_fields(directory)
    mapping = compose_mapping([*overrides, "model=hf", f"model.path={quoted(str(directory))}"])
    named = any(word.lstrip("+").startswith("data.seq_len=") for word in overrides)
    return ServedModel(
        _config(mapping), None, tokenizer_in(directory), stop_ids_in(directory),
        mapping["data"]["seq_len"] if named else None,
    )  # fmt: skip


def from_run(run: Path, step: int | None, overrides: list[str]) -> ServedModel:
    """Reads a run's checkpoint; the mesh is one rank unless the overrides say otherwise."""
    _refuse_others(overrides)
    checkpoint, commit = find_checkpoint(run, step)
    directory = checkpoint.parent.parent
    saved = config_of(checkpoint, commit, directory)
    base = {**saved.to_dict(), "parallel": asdict(ParallelConfig()), "comm": asdict(Config().comm)}
    mapping = compose_mapping(overrides, base=base)
    tokenizer = tokenizer_in(directory / MODEL_SOURCE) if (directory / MODEL_SOURCE).is_dir() else None
    named: Any = mapping["data"].get("tokenizer")
    if isinstance(named, str) and named != "bytes":
        tokenizer = tokenizer_in(Path(named))
    elif tokenizer is None and saved.data.source in _OF_BYTES:
        tokenizer = ByteTokenizer()
    return ServedModel(
        _config(mapping), checkpoint, tokenizer, stop_ids_in(directory / MODEL_SOURCE), mapping["data"]["seq_len"]
    )


def _refuse_others(overrides: list[str]) -> None:
    """Refuses overrides that generation would not read."""
    for word in overrides:
        key = word.split("=")[0].lstrip("+~")
        if not any(key == known or key.startswith(f"{known}.") for known in (*READ, *_ROPE)):
            raise UsageError(f"{word}: generate does not read {key}; it reads {', '.join((*READ, *_ROPE))}")


def _config(mapping: dict[str, Any]) -> Config:
    """Returns the configuration without what only training needs."""
    mapping = dict(mapping)
    mapping["data"] = asdict(DataConfig(source="tokens", path="prompt", seq_len=mapping["data"]["seq_len"]))
    mapping["train"] = {
        **mapping["train"], "micro_batch": 1, "recompute": "none", "recompute_keep": None, "offload": False,
        "compile": False,
    }  # fmt: skip
    mapping["attention"] = {**mapping["attention"], "ping_pong": False}
    if mapping["attention"]["server_pool"] == "pipeline":
        raise ConfigError(
            "attention.server_pool=pipeline: generation has one sequence at a time, and no other stage's attention to "
            "serve; nearest valid: attention.server_pool=sequence"
        )
    return Config.from_dict(mapping)


def settled(served: ServedModel, tokens: int) -> Config:
    """Returns the resolved configuration for so many tokens, prompt included, after all that would be refused."""
    config = served.config
    machine.require_nodes(config)
    world = simulated_world_size(config)
    config = replace(
        config,
        data=replace(config.data, seq_len=served.seq_len or tokens),
        train=replace(config.train, global_batch=fitting_rows(config, 1)),
    )
    config = resolve(config, world)
    machine.require_devices(config, world)
    require_remembered(config.model)
    build.preflight_attention(config)
    build.preflight_kernel(config)
    return config
