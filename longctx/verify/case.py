"""Describes one exactness check: what is computed, on which inputs, and how far it may be off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.attention import AttentionCase, get_strategy, refusal
from longctx.attention.runtime.local_kernel import KernelProblem, select_kernel
from longctx.errors import ConfigError
from longctx.options import DEFAULT, StrategyOptions
from longctx.sequence import Documents, Layout, Mask, SequencePlan, make_layout, make_plan

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative norm error that rounding may cost: (always, at most). Between the two it may be ROUNDING_FACTOR times
# what the same kernel loses on one device. The upper end keeps a wrong kernel from excusing itself.
TOLERANCE = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-3), "bfloat16": (1e-3, 5e-2)}
ROUNDING_FACTOR = 2.5


def check_sample(seq: int, documents: tuple[int, ...], batch: int, seed: int) -> None:
    """Refuses lengths and seeds that no sample can have. Raises ``ConfigError``."""
    for name, value in (("seq", seq), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} must be at least 0 and below 2^63; 0 is the default")
    if documents and min(documents) < 1:
        raise ConfigError(
            f"--documents {','.join(map(str, documents))}: each length must be at least 1; leave out "
            f"the {min(documents)}"
        )
    if documents and sum(documents) != seq:
        raise ConfigError(
            f"--documents {','.join(map(str, documents))} add up to {sum(documents)}; they must "
            f"add up to --seq {seq} (nearest valid: --seq {sum(documents)})"
        )


def document_lengths(words: str | None) -> tuple[int, ...]:
    """Reads lengths with commas between; none where they are left out. Raises ``ConfigError``."""
    try:
        return () if words is None else tuple(int(length) for length in words.split(","))
    except ValueError:
        raise ConfigError(f"--documents {words!r} must be whole numbers with commas between, such as 300,724") from None


@dataclass(frozen=True)
class VerifyCase:
    """One exactness check as plain data, which travels to worker processes as JSON."""

    strategy: str
    layout: str
    world: int
    backend: str = "sim"
    seq: int = 1024
    documents: tuple[int, ...] = ()
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float64"
    window: int | None = None
    causal: bool = True
    batch: int = 1
    seed: int = 0
    layout_block: int = 1
    kernel: str = "auto"
    options: StrategyOptions = DEFAULT
    mixer: str | None = None  # of a linear strategy; None for softmax attention
    chunk: int = 64
    mixer_block: int | None = None  # of mixers that come in sizes; None: the paper's
    mixer_top_k: int | None = None

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> VerifyCase:
        """Makes a case from its fields as JSON has them."""
        options = StrategyOptions(**plain["options"])
        return cls(**{**plain, "documents": tuple(plain["documents"]), "options": options})

    def __post_init__(self) -> None:
        for name in ("world", "heads", "kv_heads", "head_dim", "layout_block", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype!r} is unknown; valid: {', '.join(DTYPES)}")
        check_sample(self.seq, self.documents, self.batch, self.seed)

    @property
    def mask(self) -> Mask:
        return Mask(self.causal, self.window)

    @property
    def packing(self) -> tuple[Documents, ...]:
        return (Documents.from_lengths(self.documents or (self.seq,)),) * self.batch

    @property
    def attention_case(self) -> AttentionCase:
        """What the case asks of the strategy."""
        packed = len(self.documents) > 1
        return AttentionCase(
            self.world, self.heads, self.kv_heads, self.layout, self.mask, self.options, packed, self.kernel
        )

    def make_layout(self) -> Layout:
        return make_layout(self.layout, self.layout_block)

    def plan(self) -> SequencePlan:
        return make_plan(self.packing, self.mask, self.make_layout(), self.seq, self.world)

    def refused(self) -> str | None:
        """Returns why softmax attention is not executed exactly, None if it is.

        The reason comes from the rules of the strategy, the mask, the layout or the kernel.
        """
        problem = KernelProblem("cpu", DTYPES[self.dtype], self.heads, self.kv_heads, self.head_dim)
        try:
            reason = refusal(get_strategy(self.strategy), self.attention_case)
            if reason is None:
                self.make_layout()
                select_kernel(self.kernel, problem)
        except ConfigError as error:
            reason = str(error)
        return reason

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws (q, k, v, dout): whole tensors ``[B, S, H or Hkv, D]``, the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int) -> Tensor:
            shape = (self.batch, self.seq, heads, self.head_dim)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[self.dtype])

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads), draw(self.heads)


@dataclass(frozen=True)
class RankResult:
    """What one rank computed and what that cost it; tensors are by name, local ``[B, T/SP, H or Hkv, D]``."""

    tensors: dict[str, Tensor]
    bytes_forward: int
    bytes_backward: int
    peak_extra_bytes: int


@dataclass(frozen=True)
class Verdict:
    """What ``longctx verify`` prints; the fields are those of its JSON object."""

    strategy: str
    layout: str
    mixer: str | None
    world: int
    backend: str
    dtype: str
    refused: str | None
    errors: dict[str, float]
    bytes_forward: list[int]
    bytes_backward: list[int]
    peak_extra_bytes: int
    passed: bool
