"""Runs the package ``ring-attention-pytorch``: its ``ring_flash_attn``, flash attention in PyTorch operations."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.attention import Prepared, chunk_of, inputs_of
from longctx.verify import VerifyCase

BUCKET = 1024  # tokens; its default. It computes hidden buckets too, so that a striped layout would save nothing


def prepare(case: VerifyCase) -> Prepared:
    """Prepares the package's ring for one case on this rank."""
    from ring_attention_pytorch import ring_flash_attn

    positions = chunk_of(case, dist.get_rank())
    (q, k, v), dout = inputs_of(case, positions)
    # It lets query head h read key head h % kv_heads, where everyone else reads h * kv_heads // heads.
    order = torch.arange(case.heads).unflatten(0, (case.kv_heads, -1)).T.flatten()
    back = order.argsort()
    q, dout = q.detach()[:, :, order].contiguous().requires_grad_(), dout[:, :, order].contiguous()

    def run() -> tuple[Tensor, ...]:
        out = ring_flash_attn(q, k, v, causal=True, bucket_size=BUCKET, ring_reduce_col=True)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        return out.detach()[:, :, back], dq[:, :, back], dk, dv

    return Prepared(f"contiguous, buckets of {BUCKET}", positions, run)
