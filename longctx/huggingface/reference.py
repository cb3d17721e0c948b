"""Runs ``transformers``' own model of a directory on each document by itself: what ours is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.config import ModelConfig
from longctx.config.sections.rope import RopeConfig
from longctx.errors import ConfigError, NotAvailableError
from longctx.huggingface.config_in import model_fields
from longctx.huggingface.family import Family
from longctx.huggingface.reference_dtype import in_model_dtype, make_tables


@dataclass(frozen=True)
class ReferenceStep:
    """What one pass gave: ``logits`` ``[B, S, V]``, the mean ``loss``, gradients by Hugging Face's names."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


class Reference:
    """Holds ``transformers``' model of the directory that ``config`` names, with the positions of ``config``.

    ``patched``: whether its fp32 parts compute in ``dtype``. Tables of positions that depend on a length are made
    for the one that ``config`` declares.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, patched: bool) -> None:
        assert config.path is not None, "the configuration names a directory"
        self._dtype, self._patched = dtype, patched
        self.model = _read(Path(config.path), config, dtype)
        lengths = {section.length for section in (config.rope, config.rope_window)} - {None}
        with self.computing():
            make_tables(self.model, max((length for length in lengths if length is not None), default=1))

    def computing(self) -> AbstractContextManager[None]:
        """Holds while the model computes."""
        return in_model_dtype(self._dtype) if self._patched else nullcontext()

    def step(self, tokens: Tensor, documents: Sequence[int]) -> ReferenceStep:
        """Computes forward and backward of int64 tokens ``[B, S]``, every row packed with documents of these lengths.

        The loss is the mean over all tokens that have a successor in their own document.
        """
        self.model.zero_grad()
        count = len(tokens) * sum(length - 1 for length in documents)
        loss, rows = torch.zeros((), dtype=self._dtype), []
        for row in tokens:
            parts = []
            for document in row.split(list(documents)):
                with self.computing():
                    logits = self.model(document[None], use_cache=False).logits[0]
                share = F.cross_entropy(logits[:-1], document[1:], reduction="sum") / count
                share.backward()
                loss += share.detach()
                parts.append(logits.detach())
            rows.append(torch.cat(parts))
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return ReferenceStep(torch.stack(rows), loss, gradients)


def _read(directory: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    try:
        import transformers
    except ImportError:
        raise NotAvailableError(
            "transformers is not installed, whose models ours are compared with; pip install 'longctx[hf]'"
        ) from None
    family, fields, _ = model_fields(directory)
    published = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    published = published.get_text_config()
    if not _same_positions(config, fields):
        published.rope_parameters = _rope_parameters(config, family, published.rope_parameters)
        longest = [one for one in (config.rope.max_position_embeddings,) if one is not None]
        published.max_position_embeddings = max(longest, default=published.max_position_embeddings)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model: nn.Module = getattr(transformers, family.architecture).from_pretrained(
            directory, config=published, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    # Some classes make a few of their parameters in fp32, whatever they are asked for.
    return model.to(dtype).eval()


def _same_positions(config: ModelConfig, fields: dict[str, Any]) -> bool:
    """Whether positions are those that the directory states, and nothing of them was overridden."""
    stated = config.rope_theta == fields["rope_theta"]
    for name in ("rope", "rope_window"):
        own: RopeConfig = getattr(config, name)
        wanted = fields.get(name, {})
        stated &= all(
            getattr(own, key) == value for key, value in {**vars(RopeConfig()), **wanted}.items() if key != "length"
        )
    return stated


def _rope_parameters(config: ModelConfig, family: Family, stated: dict[str, Any]) -> dict[str, Any]:
    """Returns the positions of ``config`` in transformers' words, nested by layer type where the class has them so."""
    if "none" in (config.rope.type, config.rope_of("W").type):
        if not family.nope or config.rope_of("W").type != config.rope.type:
            raise ConfigError("model.rope.rope_type=none: this family of transformers turns all layers that attend")
        return {"rope_type": "default", "rope_theta": None}
    full = _section(config.rope, config)
    if "full_attention" not in stated:
        if config.rope_of("W") != config.rope and "W" in config.pattern:
            raise ConfigError("model.rope_window: this family of transformers has one table for all layers")
        return full
    return {"full_attention": full, "sliding_attention": _section(config.rope_of("W"), config)}


def _section(section: RopeConfig, config: ModelConfig) -> dict[str, Any]:
    own = {name: value for name, value in vars(section).items() if value is not None}
    theta = section.rope_theta or config.rope_theta
    for name in ("length", "max_position_embeddings"):
        own.pop(name, None)
    if section.type == "ntk":
        rotated = int(config.head_dim * section.partial_rotary_factor)
        own["rope_type"], theta = "default", theta * own.pop("factor") ** (rotated / (rotated - 2))
    return {**own, "rope_type": own.get("rope_type", "default"), "rope_theta": theta}
