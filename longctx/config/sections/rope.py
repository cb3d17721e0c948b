"""Configures rotary position embeddings: the type, and what its table is computed from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from longctx.errors import ConfigError
from longctx.rope import TYPES, RopeSettings, Table, table_of
from longctx.rules import above, as_word, at_least, one_of, within

_ALWAYS = ("rope_type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class RopeConfig(RopeSettings):
    """Says how positions turn queries and keys, in the words of Hugging Face's ``rope_parameters``.

    A type that needs a field refuses to guess it, and a field that the type does not read is refused.
    """

    @property
    def type(self) -> str:
        """Names the type."""
        return self.rope_type or "default"

    @property
    def is_set(self) -> bool:
        """Whether anything was chosen."""
        return self != type(self)()

    def table(self, theta: float, head_dim: int) -> Table:
        """Computes the table for heads of ``head_dim`` channels; ``theta``: where this section names none."""
        return table_of(self.type, self, self.rope_theta or theta, head_dim)

    def settled(self, seq_len: int) -> RopeConfig:
        """Returns the section with the length that its table is computed for, where it depends on one."""
        return replace(self, length=seq_len) if TYPES[self.type].by_length and self.length is None else self

    def check(self, prefix: str, head_dim: int) -> None:
        """Refuses a table that is partial, contradictory or not understood. ``prefix``: of the section's keys."""
        one_of(f"{prefix}.rope_type", self.type, tuple(TYPES))
        kind = TYPES[self.type]
        reads = {*_ALWAYS, *kind.needs, *kind.reads, *(("length",) if kind.by_length else ())}
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None and one.name in kind.needs:
                raise ConfigError(
                    f"{prefix}.{one.name}=null: {prefix}.rope_type={self.type} needs {', '.join(kind.needs)}, and "
                    "guessing one gives another model; set it"
                )
            if one.name not in reads and value != one.default:
                raise ConfigError(
                    f"{prefix}.{one.name}={as_word(value)} is not read by {prefix}.rope_type={self.type}, which reads "
                    f"{', '.join(sorted(reads))}; leave it out, or choose the type that it belongs to"
                )
        self._check_numbers(prefix, head_dim)

    def _check_numbers(self, prefix: str, head_dim: int) -> None:
        within(f"{prefix}.partial_rotary_factor", self.partial_rotary_factor, 0.0, 1.0)
        rotated = int(head_dim * self.partial_rotary_factor)
        if rotated % 2 or (rotated < 2 and self.type != "none"):
            raise ConfigError(
                f"{prefix}.partial_rotary_factor={self.partial_rotary_factor} turns {rotated} of {head_dim} channels, "
                "which must be pairs, at least one; nearest valid: "
                f"{max(2, rotated - rotated % 2) / head_dim}"
            )
        for name in ("rope_theta", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor"):
            above(f"{prefix}.{name}", getattr(self, name), 0.0)
        at_least(f"{prefix}.factor", self.factor, 1.0)
        for name in ("original_max_position_embeddings", "max_position_embeddings", "length"):
            at_least(f"{prefix}.{name}", getattr(self, name), 1)
        _ascending(prefix, "low_freq_factor", self.low_freq_factor, "high_freq_factor", self.high_freq_factor)
        _ascending(prefix, "beta_slow", self.beta_slow, "beta_fast", self.beta_fast)
        for name in ("short_factor", "long_factor"):
            self._check_factors(f"{prefix}.{name}", getattr(self, name), rotated)
        if self.type in ("ntk", "dynamic") and rotated == 2:
            raise ConfigError(f"{prefix}.rope_type={self.type} needs at least 4 rotated channels, got 2")
        known = self.factor, self.attention_factor, self.max_position_embeddings
        if self.type == "longrope" and known == (None, None, None):
            raise ConfigError(
                f"{prefix}.rope_type=longrope scales attention by how much longer it is than the original: set "
                f"{prefix}.factor, {prefix}.attention_factor or {prefix}.max_position_embeddings"
            )

    def _check_factors(self, key: str, factors: Any, rotated: int) -> None:
        if factors is None:
            return
        if len(factors) != rotated // 2 or not all(math.isfinite(one) and one > 0 for one in factors):
            raise ConfigError(
                f"{key} has {len(factors)} numbers; it takes one above 0 for each of the "
                f"{rotated // 2} channel pairs that turn"
            )


def _ascending(prefix: str, low: str, low_value: float | None, high: str, high_value: float | None) -> None:
    if low_value is not None and high_value is not None and low_value >= high_value:
        raise ConfigError(f"{prefix}.{low}={low_value} must be below {prefix}.{high}={high_value}")
