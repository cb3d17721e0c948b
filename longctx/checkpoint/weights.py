"""Starts a new run from the weights of another one's checkpoint, whatever its data, schedule, mesh and dtype were.

The optimizer, the schedule and the place in the data begin anew. The weights must have the new model's shapes; what
decides beside them which function of the tokens they are, such as the base of RoPE, may differ and is told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from longctx.checkpoint.agreement import run_on_all_ranks, this_rank
from longctx.checkpoint.config_record import another_model, changed_keys, recorded_config
from longctx.checkpoint.directory import CheckpointDirectory
from longctx.checkpoint.intact import IntactSteps
from longctx.checkpoint.manifest import Commit
from longctx.checkpoint.restoring import read_manifests, read_plain_state, with_copies
from longctx.checkpoint.shards import Located, locate, read_shards
from longctx.checkpoint.state import live_tensors, model_tensors
from longctx.errors import ConfigError, StorageError

_log = logging.getLogger(__name__)

_PREFIX = "step-"
# With others of these, the numbers of a tensor would stand for something else, even where its shape is the same.
_SHAPE = (
    "vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "hidden_dim", "qk_norm", "tie_embeddings",
    "pattern", "mixer", "linear.key_heads", "linear.value_heads", "linear.key_head_dim", "linear.value_head_dim",
    "linear.conv_taps",
)  # fmt: skip


def check_weights(source: Path, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuses weights that do not fit ``model``, which may be on the meta device; reads none of them."""
    commit = _commit(source, hashed=False)
    run_on_all_ranks(lambda: _located(source, commit, model, config) and None)


def load_weights(source: Path, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Fills this rank's part of ``model`` after all files of the checkpoint ``source`` have been verified."""
    commit = _commit(source, hashed=True)
    run_on_all_ranks(lambda: read_shards(model_tensors(live_tensors(model)), _located(source, commit, model, config)))
    changed = another_model(changed_keys(read_plain_state(source, commit)["config"], recorded_config(config)))
    if this_rank() == 0:
        told = f"; the model differs: {', '.join(changed)}" if changed else ""
        _log.warning("weights are those of %s%s", source, told)


def _commit(source: Path, hashed: bool) -> Commit:
    number = source.name.removeprefix(_PREFIX)
    if not number.isdecimal():
        raise StorageError(f"init.from={source} is no checkpoint; its name must be {_PREFIX}N")
    return IntactSteps(CheckpointDirectory(source.parent)).exactly(int(number), hashed)


def _located(source: Path, commit: Commit, model: nn.Module, config: Mapping[str, Any]) -> dict[str, list[Located]]:
    """Returns where the model's tensors lie in the checkpoint, by name, after all refusals."""
    saved = read_plain_state(source, commit)["config"]
    changed = changed_keys(saved, recorded_config(config)) if type(saved) is dict and saved else {}
    other = [changed[key] for name in _SHAPE if (key := f"model.{name}") in changed]
    if other:
        raise ConfigError(f"init.from={source}: weights of other shapes: {', '.join(other)}; set these as there")
    live = live_tensors(model)
    located = with_copies(locate(read_manifests(source, commit)), live)
    wanted = model_tensors(live)
    for name, tensor in wanted.items():
        if name not in located:
            raise ConfigError(f"init.from={source} has no {name}, which this model has; set the model's sizes as there")
        shape = located[name][0][1].shape
        if shape != tuple(tensor.shape):
            raise ConfigError(
                f"init.from={source}: {name} is {list(shape)}, and {list(tensor.shape)} here; set the model's sizes "
                "as there"
            )
    return {name: located[name] for name in wanted}
