"""Blocks that compute two nano-batches in turn: one exchanges while the other computes (``disaggregated.ping_pong``).

The two are the halves of a micro-batch's sequences. Both go through one call of the block, so that its parameters are
gathered, and their gradients reduced, once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from longctx.attention.strategies.disaggregated.ping_pong import PingPongAttention
from longctx.model import Decoder, SoftmaxBlock
from longctx.model.rotary import Rotation
from longctx.sequence import plan_of


def take_turns(model: Decoder, attention: PingPongAttention) -> None:
    """Lets softmax layers of a model compute two nano-batches in turn; linear ones exchange too little to hide."""
    for block in model.layers:
        if isinstance(block, SoftmaxBlock):
            turns = partial(in_turn, block, attention)
            block.forward = partial(  # type: ignore[method-assign]
                as_lent, block, block.attention, block.forward, turns
            )


def as_lent(
    block: SoftmaxBlock, own: object, forward: Callable[..., Tensor], turns: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """Computes a block in turns while it has its own attention, and as usual while it was lent another one.

    Generation lends blocks another attention.
    """
    return (turns if block.attention is own else forward)(*inputs)


def in_turn(block: SoftmaxBlock, attention: PingPongAttention, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
    """Computes a block over the two halves of a batch in turn.

    x ``[B, T/SP, dim]`` with an even B, to the same shape. ``plan``: the handle of the whole batch's plan.
    """
    whole = plan_of(plan)
    inputs = x.chunk(2)
    turned = [None, None] if rotation is None else list(zip(*(part.chunk(2) for part in rotation), strict=True))
    projected = [block.pre(half, turn) for half, turn in zip(inputs, turned, strict=True)]
    under_way = [attention.start(*half.qkv, whole.half(number).handle) for number, half in enumerate(projected)]
    under_way = [attention.serve(run) for run in under_way]
    outputs = [half.gated(attention.finish(run)) for half, run in zip(projected, under_way, strict=True)]
    return torch.cat([block.post(out, half) for out, half in zip(outputs, inputs, strict=True)])
