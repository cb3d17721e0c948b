"""Reads ``config.json`` strictly: a key that is neither read nor known to change no number is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from longctx.config.parsing import read_value
from longctx.errors import ConfigError

# Of the file, the tokenizer, generation and training elsewhere: no number of a forward pass depends on them.
_HARMLESS = """
    architectures auto_map model_type transformers_version dtype torch_dtype use_bfloat16 torchscript name_or_path
    _name_or_path _attn_implementation attn_implementation _attn_implementation_autoset cache_implementation use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id bos_token eos_token
    pad_token
    tokenizer_class prefix max_position_embeddings output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder pruned_heads id2label label2id problem_type task_specific_params finetuning_task
    unsloth_version unsloth_fixed _sliding_window_pattern
"""
HARMLESS = frozenset(_HARMLESS.split())
_LARGEST = 2**63 - 1  # what torch takes
_MOST_LAYERS = 1 << 16


class Keys:
    """Hands out the keys of one ``config.json`` and remembers which were read. ``where``: its path, for messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = dict(values)
        self._read: set[str] = set()
        self.where = where

    def take(self, name: str, default: Any) -> Any:
        """Returns the value of a key, or what its class has where the file leaves it out."""
        self._read.add(name)
        return self._values.get(name, default)

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Returns a size, which a file must state where its class has no default."""
        found = self.optional(name, default, least)
        if found is None and default is not None:
            self.refuse(name, None, f"a whole number of at least {least} belongs there")
        if found is None:
            raise ConfigError(f"{self.where} lacks {name}; a model cannot be made without it")
        return found

    def optional(self, name: str, default: int | None = None, least: int = 1) -> int | None:
        """Returns a size, or None where the file says null or leaves it out."""
        found = self.take(name, default)
        if found is not None and (type(found) is not int or not least <= found <= _LARGEST):
            self.refuse(name, found, f"a whole number of at least {least} belongs there")
        return found

    @property
    def layers(self) -> int:
        """Counts the layers."""
        found = self.size("num_hidden_layers")
        if found > _MOST_LAYERS:  # lists of them are made
            self.refuse("num_hidden_layers", found, f"a model has at most {_MOST_LAYERS} layers")
        return found

    def real(self, name: str, default: float) -> float:
        """Returns a number above 0."""
        found = self.optional_real(name, default)
        if found is None:
            self.refuse(name, None, "a number above 0 belongs there")
        return found

    def optional_real(self, name: str, default: float | None = None) -> float | None:
        """Returns a number above 0, or None where the file says null or leaves it out."""
        found: float | None = self._typed(name, float | None, default)
        if found is not None and found <= 0.0:
            self.refuse(name, found, "a number above 0 belongs there")
        return found

    def flag(self, name: str, default: bool) -> bool:
        """Returns a switch."""
        return bool(self._typed(name, bool, default))

    def word(self, name: str, default: str) -> str:
        """Returns a word."""
        return str(self._typed(name, str, default))

    def words(self, name: str) -> list[str] | None:
        """Returns a list of words, or None where the file says null or leaves it out."""
        found = self._typed(name, tuple[str, ...] | None, None)
        return None if found is None else list(found)

    def _typed(self, name: str, hint: Any, default: Any) -> Any:
        return read_value(f"{self.where}: {name}", hint, self.take(name, default))

    def expect(self, name: str, value: Any, rule: str) -> None:
        """Refuses any other value of a key than the one that is computed here; ``rule`` says why."""
        found = self.take(name, value)
        if found != value:
            self.refuse(name, found, f"{rule}; valid: {value}")

    def refuse(self, name: str, value: Any, rule: str) -> NoReturn:
        """Raises ``ConfigError`` for the value of a key."""
        raise ConfigError(f"{self.where}: {name}={value!r} is not computed here: {rule}")

    @property
    def read(self) -> frozenset[str]:
        """Names the keys that were read."""
        return frozenset(self._read)

    def finish(self) -> list[str]:
        """Lists the keys that change no number; refuses all that nobody has read."""
        rest = {name: value for name, value in self._values.items() if name not in self._read}
        unknown = {
            name: value for name, value in rest.items() if name not in HARMLESS and value not in (None, False, {}, [])
        }
        if unknown:
            raise ConfigError(
                f"{self.where} holds {', '.join(f'{name}={value!r:.80}' for name, value in sorted(unknown.items()))}, "
                "which may change what the model computes and is not understood here; remove what is not needed, or "
                "train another family"
            )
        return sorted(rest)
