"""Runs other packages' attention of a sharded sequence, each by the call that its own documentation shows.

A peer takes a ``VerifyCase`` (causal, one sequence, one document) and returns its pass over this rank's share. It
chooses its own layout; where it has a balanced one, it gets it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.verify import VerifyCase


@dataclass(frozen=True)
class Prepared:
    """Holds a peer that is ready to run on this rank.

    ``run``: (out, dq, dk, dv) of the tokens at ``positions`` (int64, global), ``[B, n, H or Hkv, D]`` each.
    ``setting``: in words, the layout and what else was chosen.
    """

    setting: str
    positions: Tensor
    run: Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Peer:
    """Names another package: ``package`` is what must be importable, ``install`` the words after ``pip install``."""

    title: str
    package: str
    install: str
    prepare: Callable[[VerifyCase], Prepared]

    def missing(self) -> str | None:
        """Names the package if it is not installed here, None where it is."""
        if importlib.util.find_spec(self.package) is None:
            return f"not installed: pip install {self.install}"
        return None


def inputs_of(case: VerifyCase, positions: Tensor) -> tuple[list[Tensor], Tensor]:
    """Makes q, k, v of these tokens, which want gradients, and the upstream gradient."""
    *inputs, dout = (whole[:, positions].contiguous() for whole in case.inputs())
    return [tensor.requires_grad_() for tensor in inputs], dout


def chunk_of(case: VerifyCase, rank: int) -> Tensor:
    """Returns the positions of the rank's share where shares are consecutive."""
    if case.seq % case.world:
        raise ValueError(f"{case.seq} tokens do not divide over {case.world} ranks")
    return torch.arange(case.seq).chunk(case.world)[rank]
