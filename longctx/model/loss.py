"""Computes the cross-entropy of a long sequence in chunks of tokens: the full logits ``[N, V]`` never exist.

A chunk's logits, loss and gradients are computed in one go in the forward pass; backward only multiplies by
the upstream gradient. That holds two gradients (of the hidden states and of the head) in place of the logits
and computes nothing twice. Known from Liger Kernel's fused linear cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.sequence import IGNORE

# Hidden states [n, dim], weight [V, dim] and labels [n] of one chunk to its loss and the gradient of its logits.
ChunkLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of one chunk and the gradient of its logits ``[n, V]``; both are zero for ignored tokens.

    ``where`` rather than a product: an ignored token's hidden state may be anything, even infinite.
    """
    logits = (hidden @ weight.T).to(loss_dtype(hidden))
    ignored = labels == IGNORE
    target = labels.masked_fill(ignored, 0)[:, None]
    logsumexp = logits.logsumexp(dim=1, keepdim=True)
    loss = (logsumexp - logits.gather(1, target)).masked_fill(ignored[:, None], 0.0).sum()
    dlogits = logits.sub_(logsumexp).exp_()
    dlogits.scatter_add_(1, target, dlogits.new_full((), -1.0).expand_as(target))
    return loss, dlogits.masked_fill_(ignored[:, None], 0.0)


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, chunk_loss_function: ChunkLoss = chunk_loss
) -> Tensor:
    """Sums the cross-entropy of ``hidden @ weight.T`` over the tokens whose label is not ``IGNORE``.

    hidden ``[N, dim]``, weight ``[V, dim]``, labels int64 ``[N]``. The result is a scalar in fp32, fp64 for fp64;
    softmax, sums and the head's gradient accumulate in the same. ``chunk_loss_function`` computes a chunk: another one
    serves a weight that is only part of the vocabulary.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, chunk_loss_function)
        return loss
    total = hidden.new_zeros((), dtype=loss_dtype(hidden))
    for rows in _chunks(hidden, chunk):
        total += chunk_loss_function(hidden[rows], weight, labels[rows])[0]
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, chunk_loss_function: ChunkLoss
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=loss_dtype(hidden))
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=loss_dtype(hidden))
        for rows in _chunks(hidden, chunk):
            loss, dlogits = chunk_loss_function(hidden[rows], weight, labels[rows])
            total += loss
            dlogits = dlogits.to(hidden.dtype)
            torch.mm(dlogits, weight, out=dhidden[rows])
            if dweight.dtype == hidden.dtype:
                dweight.addmm_(dlogits.T, hidden[rows])
            else:
                dweight += dlogits.T @ hidden[rows]
            del dlogits  # or the next chunk's logits would stand beside it
        ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        (scale,) = upstream
        if torch._C._autograd._get_current_graph_task_keep_graph():
            # Another pass over this graph follows: a pipeline's split backward, or the user's.
            return (dhidden * scale).to(dhidden.dtype), (dweight * scale).to(dweight.dtype), None, None, None
        # In place, for they are as large as anything here.
        return dhidden.mul_(scale), dweight.mul_(scale), None, None, None


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype that softmax and sums are computed in: at least fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(hidden: Tensor, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, len(hidden), chunk)]
