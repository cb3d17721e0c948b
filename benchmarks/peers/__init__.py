"""Trains the same decoder by other systems on two processes, as a competent user of them would write it.

A peer takes the decoder with its initial weights and returns its step. A step maps whole tokens and labels ``[1, S]``,
equal on all ranks, to the mean loss over all of them. Attention alone has peers of its own (``peers.attention``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks.peers import ring_attention_pytorch, torch_context_parallel, ulysses
from benchmarks.peers.attention import Peer, Prepared
from longctx.model import Decoder

Step = Callable[[Tensor, Tensor], float]

PEERS: dict[str, Callable[[Decoder, float, int], Step]] = {
    "torch": torch_context_parallel.prepare,
    "ulysses": ulysses.prepare,
}

ATTENTION_PEERS = {
    "torch_ring": Peer(
        "torch context parallel, ring", "torch", "torch", partial(torch_context_parallel.prepare_attention, "alltoall")
    ),
    "torch_allgather": Peer(
        "torch context parallel, all-gather",
        "torch",
        "torch",
        partial(torch_context_parallel.prepare_attention, "allgather"),
    ),
    "ulysses": Peer(
        "DeepSpeed-Ulysses",
        "deepspeed",
        "--no-build-isolation deepspeed==0.19.8",
        ulysses.prepare_attention,
    ),
    "ring_attention_pytorch": Peer(
        "ring-attention-pytorch",
        "ring_attention_pytorch",
        "ring-attention-pytorch==0.5.20",
        ring_attention_pytorch.prepare,
    ),
}

__all__ = ["ATTENTION_PEERS", "PEERS", "Peer", "Prepared", "Step"]
