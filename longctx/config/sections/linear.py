"""Configures what linear layers have otherwise than the softmax layers beside them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from longctx.config.readers import for_some
from longctx.errors import ConfigError
from longctx.rules import above, at_least, divisors, nearest_of, one_of

NORMS = ("pre", "post", "both")


@dataclass(frozen=True)
class LinearHeads:
    """Counts the heads of a linear layer and their channels; each key head serves consecutive value heads."""

    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int

    @property
    def keys(self) -> int:
        """Returns the width of all key heads, which is that of all queries too."""
        return self.key_heads * self.key_head_dim

    @property
    def values(self) -> int:
        """Returns the width of all value heads."""
        return self.value_heads * self.value_head_dim


@dataclass(frozen=True)
class LinearConfig:
    """Says what linear layers have otherwise than softmax layers; null: as they have it."""

    key_heads: int | None = for_some(None)  # null: model.heads
    value_heads: int | None = for_some(None)  # null: model.heads; each key head serves as many of them
    key_head_dim: int | None = for_some(None)  # null: model.head_dim
    value_head_dim: int | None = for_some(None)  # null: model.head_dim
    conv_taps: int | None = for_some(None)  # tokens that a short convolution reads, its own among them; null: 4
    negative_eigenvalues: bool = for_some(False)  # writes are doubled, so that a state may change its sign
    norm: str | None = None  # null: model.norm
    norm_eps: float | None = None  # of the norm of what a head reads; null: model.norm_eps

    @property
    def mixer_sizes(self) -> dict[str, int | bool | None]:
        """Returns the fields that make the mixer another one, by name; None for what it has by itself."""
        return {"conv_taps": self.conv_taps, "negative_eigenvalues": self.negative_eigenvalues or None}

    @property
    def is_set(self) -> bool:
        """Whether anything was chosen."""
        return self != type(self)()

    def heads(self, heads: int, head_dim: int) -> LinearHeads:
        """Returns the heads of a linear layer beside softmax layers of ``heads`` heads of ``head_dim`` channels."""
        return LinearHeads(
            self.key_heads or heads,
            self.value_heads or heads,
            self.key_head_dim or head_dim,
            self.value_head_dim or head_dim,
        )

    def check(self, prefix: str, heads: int) -> None:
        """Refuses what no layer can have. ``prefix``: of the section's keys; ``heads``: of softmax layers."""
        for one in fields(self):
            if one.name not in ("negative_eigenvalues", "norm", "norm_eps"):
                at_least(f"{prefix}.{one.name}", getattr(self, one.name), 1)
        above(f"{prefix}.norm_eps", self.norm_eps, 0.0)
        if self.norm is not None:
            one_of(f"{prefix}.norm", self.norm, NORMS)
        keys, values = self.key_heads or heads, self.value_heads or heads
        if values % keys:
            raise ConfigError(
                f"{prefix}.key_heads={keys} must divide {prefix}.value_heads={values}, of which each key head serves "
                f"as many; nearest valid key_heads: {nearest_of(keys, divisors(values))}"
            )
