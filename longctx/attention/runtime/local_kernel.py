"""The contract of a local attention kernel, and how one is chosen.

A kernel computes a list of tiles on one device. It knows nothing of ranks, layouts or masks: a tile says all that.
Kernels live in ``longctx.kernels`` and are loaded by name when first asked for, so that importing longctx needs
neither CUDA nor Triton.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from longctx.attention.runtime.partial import Partial
from longctx.catalog import KERNELS
from longctx.errors import ConfigError
from longctx.rules import one_of
from longctx.sequence import TileSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelProblem:
    """Describes what the choice of a kernel depends on."""

    device: str  # "cpu" or "cuda"
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} on {self.device} with {self.heads}/{self.kv_heads} heads of {self.head_dim}"


class LocalKernel(Protocol):
    """Computes attention of tiles on one device.

    Shapes: q ``[B, Tq, H, D]``, k and v ``[B, Tk, Hkv, D]`` with Hkv dividing H (query head h reads key head h * Hkv //
    H). Tiles index the second dimension. Inputs may be strided views.
    """

    name: str

    def refuses(self, problem: KernelProblem) -> str | None:
        """Returns why this kernel can't run the problem exactly; None if it can."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[TileSet], scale: float, into: Partial) -> None:
        """Merges the attention of all tiles into ``into``, whose rows are those of q."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tiles: Sequence[TileSet],
        scale: float,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Adds the tiles' share of (dq, dk, dv) to ``grads``, in their accumulation dtype.

        ``out`` ``[B, Tq, H, D]`` (dtype of q) and ``lse`` ``[B, Tq, H]`` are global: over all keys of all ranks, not
        only of these tiles. That makes tiles independent of one another. ``out`` counts through rowsum(dout * out)
        alone, in every kernel: a surrogate with the same sum will do (``attention.delta``).
        """
        ...


@lru_cache
def load_kernel(name: str) -> LocalKernel:
    """Returns the kernel of a name, one instance per process; it is imported when first considered."""
    one_of(KERNELS.key, name, ("auto", *KERNELS))
    kernel: LocalKernel = KERNELS.load(name)()
    return kernel


@lru_cache
def select_kernel(name: str, problem: KernelProblem) -> LocalKernel:
    """Returns the named kernel, or for "auto" the first that doesn't refuse; each refusal is logged once."""
    if name != "auto":
        kernel = load_kernel(name)
        reason = kernel.refuses(problem)
        if reason:
            raise ConfigError(f"attention.kernel {name!r} refuses {problem}: {reason}; use attention.kernel=auto")
        return kernel
    for candidate in map(load_kernel, KERNELS):
        reason = candidate.refuses(problem)
        if reason is None:
            log.info("attention kernel %s chosen for %s", candidate.name, problem)
            return candidate
        log.info("attention kernel %s refused: %s", candidate.name, reason)
    raise AssertionError("the dense kernel refuses nothing")


def kernel_for(name: str, q: Tensor, k: Tensor) -> LocalKernel:
    """Selects a kernel for these tensors: q ``[B, T, H, D]``, k ``[B, T, Hkv, D]``."""
    return select_kernel(name, KernelProblem(q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3]))
