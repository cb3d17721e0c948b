"""Configures one source of a mixture: where its documents are, and how much of what a run reads they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from longctx.errors import ConfigError
from longctx.rules import within

WEIGHTS = ("tokens", "documents")


@dataclass(frozen=True)
class MixtureSource:
    """Says where the documents of one source are, and what share of the mixture it has.

    The fields of reading mean what those of the section ``data`` mean.
    """

    weight: float = 1.0  # its share is this among the weights of all; 0 leaves it out
    source: str = "text"
    path: str | None = None
    text_key: str = "text"
    files: str | None = None
    token_dtype: str = "uint16"
    max_documents: int | None = None
    repeat_longer: dict[int, int] = field(default_factory=dict)  # {8192: 3}: longer documents come 3 times an epoch
    max_epochs: float | None = None  # a run that would go over it more often is refused; null: repeated, and told

    def check(self, name: str) -> None:
        """Refuses weights, bounds and buckets without meaning. ``name``: of the source, for messages."""
        key = f"data.mixture.{name}"
        within(f"{key}.weight", self.weight, 0.0, 1e9)
        if self.max_epochs is not None and self.max_epochs <= 0:
            raise ConfigError(
                f"{key}.max_epochs={self.max_epochs:g} must be above 0; nearest: {key}.weight=0, or {key}.max_epochs=1"
            )
        for length, times in self.repeat_longer.items():
            if length < 0 or not 1 <= times <= 1000:
                raise ConfigError(
                    f"{key}.repeat_longer.{length}={times}: documents longer than a length of 0 or more come 1 to "
                    f"1000 times an epoch; nearest: {key}.repeat_longer.{max(0, length)}={min(max(1, times), 1000)}"
                )
