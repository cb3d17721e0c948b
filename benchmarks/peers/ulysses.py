"""Trains by DeepSpeed's best for long contexts: Ulysses, ZeRO-3, tiled MLP, tiled logits and loss, recompute."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.attention import Prepared, chunk_of, inputs_of
from longctx.attention.core import Started
from longctx.model import Block, Decoder
from longctx.model.rotary import rotations
from longctx.verify import VerifyCase

# In elements. The defaults are made for models a thousand times larger and would fill the memory by themselves.
BUCKET = 1_000_000
LIVE_PARAMETERS = 1_000_000


def prepare(model: Decoder, lr: float, tile: int) -> Callable[[Tensor, Tensor], float]:
    """Prepares DeepSpeed's step; ``tile``: tokens of an MLP's and of a loss's tile, which divide what a rank holds."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    model.set_attention(_Ulysses())
    for block in model.layers:
        block.post = MethodType(_tiled_post(tile), block)  # type: ignore[method-assign]
    whole = _Tiled(model, tile)
    engine, *_ = deepspeed.initialize(
        model=whole, optimizer=torch.optim.AdamW(whole.parameters(), lr=lr, weight_decay=0.0), config=_settings()
    )
    rank, world = dist.get_rank(), dist.get_world_size()

    def step(tokens: Tensor, labels: Tensor) -> float:
        positions = torch.arange(tokens.shape[1])[None]
        own = [tensor.chunk(world, dim=1)[rank].contiguous() for tensor in (tokens, positions, labels)]
        loss = engine(*own)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return float(mean) / world

    return step


def prepare_attention(case: VerifyCase) -> Prepared:
    """Prepares DeepSpeed's Ulysses attention for one case on this rank."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    positions = chunk_of(case, dist.get_rank())
    (q, k, v), dout = inputs_of(case, positions)
    exchange, no_plan = _Ulysses(), torch.empty(0)

    def run() -> tuple[Tensor, ...]:
        out = exchange.start(q, k, v, no_plan).out
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    return Prepared("contiguous", positions, run)


def _settings() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "stage3_max_reuse_distance": LIVE_PARAMETERS,
            "stage3_param_persistence_threshold": 0,
        },
        "steps_per_print": 1_000_000,
    }


class _Ulysses:
    """Swaps all heads of a part of the tokens for all tokens of a part of the heads, and back."""

    def __init__(self) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        assert dist.group.WORLD is not None
        self._exchange = DistributedAttention(_local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started:
        return Started(self._exchange(q, k, v, 0))

    def finish(self, started: Started) -> Tensor:
        return started.out


def _local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def _tiled_post(tile: int) -> Callable[[Block, Tensor, Tensor], Tensor]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def mlp(block: Block, y: Tensor) -> Tensor:
        out: Tensor = block.mlp_out(F.silu(block.gate(y)) * block.up(y))
        return out

    def post(block: Block, o: Tensor, x: Tensor) -> Tensor:
        x = x + block.attention_out(o.flatten(-2))
        weights = [block.gate.weight, block.up.weight, block.mlp_out.weight]
        out: Tensor = x + TiledMLP.apply(mlp, block, block.mlp_norm(x), x.shape[1] // tile, weights)
        return out

    return post


class _Tiled(nn.Module):
    """Runs the decoder's forward pass with each block recomputed and the loss in tiles."""

    def __init__(self, decoder: Decoder, tile: int) -> None:
        super().__init__()
        self.decoder = decoder
        self._tile = tile

    def forward(self, tokens: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        decoder, config = self.decoder, self.decoder.config
        assert decoder.head is not None, "an untied head, for ZeRO-3 gathers a module's own weights"
        assert decoder.embedding is not None and decoder.norm is not None, "a whole decoder"
        x = decoder.embedding(tokens)
        rotation = rotations(positions, config, torch.float32)["S"]
        for block in decoder.blocks:
            x = checkpoint(block, x, rotation, torch.empty(0), use_reentrant=False)
        # Equal tiles and their mean: with "sum" a later division would not reach the head's gradient.
        loss: Tensor = TiledFusedLogitsLoss.apply(
            _tile_loss, decoder, decoder.norm(x), labels, None, x.shape[1] // self._tile, [decoder.head.weight], "mean"
        )
        return loss


def _tile_loss(decoder: Decoder, hidden: Tensor, labels: Tensor) -> Tensor:
    assert decoder.head is not None
    return F.cross_entropy(decoder.head(hidden), labels)
