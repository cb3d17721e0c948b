"""Tokenizers made in tests, and saved as Hugging Face folders have them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")

from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: E402 - after the skip

END, BEGIN = "<|endoftext|>", "<|begin|>"
CONFIG = {"eos_token": END, "bos_token": {"content": BEGIN, "special": True}}


@cache
def trained(alphabet: bool = True) -> str:
    """``tokenizer.json`` of a byte-level BPE, trained on pages of the manual."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[END, BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    page = Path(__file__).parents[2] / "docs/data.md"
    library.train_from_iterator(page.read_text(encoding="utf-8").splitlines(), trainer)
    return str(library.to_str())


def parts_of(text: str | None = None) -> Any:
    """``tokenizer.json`` as a mapping, to be changed."""
    return json.loads(text or trained())


def saved(folder: Path, parts: Any = None, config: Any = CONFIG) -> Path:
    """Writes a tokenizer's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(parts or parts_of()), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
