"""Configures the decoder: its sizes, and the kinds of its layers."""

from __future__ import annotations

from dataclasses import dataclass, fields

from longctx.catalog import MIXERS
from longctx.config.readers import for_some, refuse_unread
from longctx.errors import ConfigError
from longctx.rules import above, as_word, at_least, divisors, nearest_multiples, nearest_of

# Of a layer, in model.pattern: softmax attention, linear attention.
LAYER_KINDS = ("S", "L")


@dataclass(frozen=True)
class ModelConfig:
    """Configures a Llama-style decoder."""

    name: str = "tiny"
    vocab_size: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden_dim: int = 384  # width of SwiGLU
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.06  # falls with the width: 0.02 suits 2,048 and more
    pattern: str = "S"  # kinds of layers, repeated: S softmax attention, L linear attention
    mixer: str | None = None  # what linear layers compute
    mixer_block: int | None = for_some(None)  # tokens of a block of moba, of a chunk of rat; null: the paper's
    mixer_top_k: int | None = for_some(None)  # blocks that a query of moba reads, its own among them; null: the paper's

    @property
    def kinds(self) -> str:
        """Returns the kind of each layer, one letter a layer."""
        return (self.pattern * self.layers)[: self.layers]

    @property
    def mixer_sizes(self) -> dict[str, int | None]:
        """Returns the fields that some mixers read, by name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.metadata.get("for_some")}

    def check(self) -> None:
        """Refuses sizes that no decoder can have."""
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "hidden_dim"):
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("rope_theta", "norm_eps", "init_std"):
            above(f"model.{name}", getattr(self, name), 0.0)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}; "
                f"nearest valid kv_heads: {nearest_of(self.kv_heads, divisors(self.heads))}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim={self.head_dim} must be even, for RoPE turns pairs of channels; "
                f"nearest valid head_dim: {nearest_multiples(self.head_dim, 2)}"
            )
        self._check_kinds()

    def _check_kinds(self) -> None:
        if set(self.pattern) - set(LAYER_KINDS):
            near = "".join(letter for letter in self.pattern.upper() if letter in LAYER_KINDS)
            raise ConfigError(
                f"model.pattern={self.pattern} must be made of S (softmax attention) and L (linear "
                f"attention); nearest valid: {near or 'S'}"
            )
        if len(self.pattern) > self.layers:
            raise ConfigError(
                f"model.pattern={self.pattern} is longer than model.layers={self.layers}; nearest valid: "
                f"model.layers={len(self.pattern)}, or model.pattern={self.kinds}"
            )
        if self.mixer is not None:
            MIXERS.require(self.mixer)
        refuse_unread(self, "model", MIXERS, self.mixer, "model.mixer")
        for name, value in self.mixer_sizes.items():
            at_least(f"model.{name}", value, 1)
        if (self.mixer is not None) != ("L" in self.pattern):
            told, near = (
                ("has linear layers, which need one", next(iter(MIXERS)))
                if self.mixer is None
                else ("has no linear layer that reads it", "null")
            )
            raise ConfigError(
                f"model.mixer={as_word(self.mixer)}: model.pattern={self.pattern} {told}; nearest valid: {near}"
            )
