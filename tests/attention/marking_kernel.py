"""A local kernel whose calls can be seen in a trace, also those that owe nothing."""

from __future__ import annotations

from typing import Any

import torch

from longctx.kernels.flash_cpu import FlashCpu

FORWARD, BACKWARD = "aten.erfinv", "aten.lgamma"  # nothing else here computes either


class Marking(FlashCpu):
    name = "marking"

    def forward(self, q: torch.Tensor, *others: Any) -> None:
        torch.erfinv(q.new_zeros(1))
        super().forward(q, *others)

    def backward(self, dout: torch.Tensor, *others: Any) -> None:
        torch.lgamma(dout.new_zeros(1))
        super().backward(dout, *others)
