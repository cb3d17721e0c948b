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
from longctx.huggingface.reference.dtype import in_model_dtype, make_tables
from longctx.huggingface.rope_in import LONGEST
from longctx.huggingface.writing.rope_out import lengths_of, rope_keys


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
    own = {} if _same_positions(config, fields) else _positions(config, family)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        published = transformers.AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
        published.update(own)
        model: nn.Module = getattr(transformers, family.architecture).from_pretrained(
            directory, config=published, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    except Exception as error:  # whatever its rules are, ours have taken the directory
        raise ConfigError(
            f"{directory}: transformers cannot make the model that ours is compared with: {type(error).__name__}: "
            f"{error}"
        ) from error
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


def _positions(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns the keys of transformers that state other positions than the directory does."""
    full, window = config.rope, config.rope_of("W")
    if "none" in (full.type, window.type) and not (family.nope and full.type == window.type):
        raise ConfigError("model.rope.rope_type=none: this family of transformers turns all layers that attend")
    if full != window and not family.by_layer:
        raise ConfigError("model.rope_window: this family of transformers has one table for all layers")
    lengths = lengths_of(config, config.rope.length or 1, None, changed=True)
    keys, _ = rope_keys(family, config, lengths)
    return {name: keys[name] for name in ("rope_parameters", LONGEST) if name in keys}
