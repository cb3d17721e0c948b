"""Fills a sharded model with the weights of a directory: each rank reads what it keeps, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from longctx.checkpoint.shards import Located, read_shards
from longctx.checkpoint.state import COPY, live_tensors
from longctx.config import ModelConfig
from longctx.huggingface.config_in import model_fields
from longctx.huggingface.names import Names, place_of, published_name
from longctx.huggingface.pieces import as_published
from longctx.huggingface.weights import locate_weights, match_names, require_one_head


def load_directory(model: nn.Module, config: ModelConfig) -> None:
    """Reads the weights of ``config.path`` into ``model``, whatever its mesh; they take the model's dtype.

    Raises ``ConfigError`` where the directory holds another model, ``DataError`` where a file is damaged.
    """
    live = {name: tensor.detach() for name, tensor in live_tensors(model).items()}
    read_shards(live, locate_parameters(config, live))


def locate_parameters(config: ModelConfig, live: Mapping[str, Tensor]) -> dict[str, list[Located]]:
    """Returns where the directory ``config.path`` holds parameters, by our names; ``live``: those of a model."""
    assert config.path is not None, "the configuration names a directory"
    directory = Path(config.path)
    family, _, _ = model_fields(directory)
    wanted = {name: place_of(name.removesuffix(COPY), config, family.names) for name in live}
    own = {name.removesuffix(COPY): tuple(tensor.shape) for name, tensor in live.items()}
    pieces = as_published(locate_weights(directory), family.names, directory)
    located = match_names(pieces, wanted, own, directory, whole_model(config, family.names))
    if config.tie_embeddings:
        require_one_head(pieces, family.names.prefix, directory)
    return located


def whole_model(config: ModelConfig, names: Names) -> set[str]:
    """Lists the published names of all parameters of a model, also those that other ranks keep."""
    import torch

    from longctx.model import Decoder

    with torch.device("meta"):
        parameters = [name for name, _ in Decoder(config).named_parameters()]
    return {published_name(name, config, names) for name in parameters}
