"""Fills a sharded model with the weights of a directory: each rank reads what it keeps, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from longctx.checkpoint.shards import read_shards
from longctx.checkpoint.state import COPY, live_tensors
from longctx.config import ModelConfig
from longctx.huggingface.config_in import model_fields
from longctx.huggingface.names import published_name
from longctx.huggingface.weights import locate_weights, match_names, require_one_head


def load_directory(model: nn.Module, config: ModelConfig) -> None:
    """Reads the weights of ``config.path`` into ``model``, whatever its mesh; they take the model's dtype.

    Raises ``ConfigError`` where the directory holds another model, ``DataError`` where a file is damaged.
    """
    assert config.path is not None, "the configuration names a directory"
    directory = Path(config.path)
    family, _, _ = model_fields(directory)
    live = {name: tensor.detach() for name, tensor in live_tensors(model).items()}
    wanted = {name: published_name(name.removesuffix(COPY), config, family.prefix) for name in live}
    shapes = {name: tuple(tensor.shape) for name, tensor in live.items()}
    found = locate_weights(directory)
    located = match_names(found, wanted, shapes, directory, whole_model(config, family.prefix))
    if config.tie_embeddings:
        require_one_head(found, family.prefix, directory)
    read_shards(live, located)


def whole_model(config: ModelConfig, prefix: str) -> set[str]:
    """Lists the published names of all parameters of a model, also those that other ranks keep."""
    import torch

    from longctx.model import Decoder

    with torch.device("meta"):
        names = [name for name, _ in Decoder(config).named_parameters()]
    return {published_name(name, config, prefix) for name in names}
