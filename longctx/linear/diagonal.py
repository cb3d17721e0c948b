"""Computes chunks of linear attention whose state decays not at all, by head, or by channel.

    S_t = Diag(a_t) S_{t-1} + k_t v_t        o_t = q_t S_t

With G the sum of log decays from the start of the chunk, or of the document where that is later, a chunk is

    A = e^{G_C}        B = (K e^{G_C - G})^T V        O = (Q e^G) S_in + (Q K^T . e^{G_i - G_j}) V

Katharopoulos et al., "Transformers are RNNs" (2020); Yang et al., "Gated Linear Attention Transformers with
Hardware-Efficient Training" (2024). The gate by channel needs the latter's sub-chunks with a local reference:
e^G e^{-G} would overflow. Every exponent here is a difference that is at most 0, and masked before it is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.linear.chunks import Chunks

SUBCHUNK = 16  # tokens that a gate by channel computes pair by pair


@dataclass(frozen=True)
class DiagonalWrites:
    """What the tokens of a chunk write: its ``transition`` and ``addition``, and what they were computed from.

    ``transition`` ``[B, N, H, 1 or K, 1]``, ``addition`` ``[B, N, H, K, V]``. They came from q, k, v and summed log
    decays ``[B, N, H, C, 1 or K or V]``.
    """

    transition: Tensor
    addition: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None


def write(q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], chunks: Chunks) -> DiagonalWrites:
    """Computes what each chunk writes to the state.

    q, k ``[B, T/SP, H, K]``, v ``[B, T/SP, H, V]``; ``gates``: none, or the log decay ``[H]``, ``[B, T/SP, H]`` or
    ``[B, T/SP, H, K]``, at most 0 everywhere.
    """
    acc_dtype = accumulation_dtype(q.dtype)
    q, k, v = (chunks.cut(tensor.to(acc_dtype)) for tensor in (q, k, v))
    keep = chunks.keep[:, :, None, None, None]
    if not gates:
        written = k.masked_fill(~by_token(chunks.tail), 0)
        return DiagonalWrites(keep.to(acc_dtype), written.mT @ v, q, k, v, None)
    decay = summed(cut_decay(gates[0].to(acc_dtype), chunks), chunks)
    last = decay[..., -1:, :]
    transition = (last.masked_fill(~keep, -torch.inf)).exp().mT
    return DiagonalWrites(transition, (k * remaining(decay, chunks)).mT @ v, q, k, v, decay)


def reads(written: DiagonalWrites, chunks: Chunks) -> Tensor:
    """Returns E ``[B, N, H, C, K]`` of O = E S_in + ..., with S_in the state that enters the chunk."""
    if written.decay is None:
        return written.q.masked_fill(~by_token(chunks.head), 0)
    return written.q * written.decay.masked_fill(~by_token(chunks.head), -torch.inf).exp()


def intra(written: DiagonalWrites, chunks: Chunks) -> Tensor:
    """Returns what tokens read of their own chunk, ``[B, N, H, C, V]``."""
    return scores(written.q, written.k, written.decay, chunks) @ written.v


def by_token(mask: Tensor) -> Tensor:
    """Reshapes a mask of tokens ``[B', N, C]`` to ``[B', N, 1, C, 1]``."""
    return mask[:, :, None, :, None]


def cut_decay(log_decay: Tensor, chunks: Chunks) -> Tensor:
    """Cuts a log decay into chunks, ``[B or 1, N, H, C, 1 or K]``."""
    if log_decay.ndim == 1:
        return log_decay[:, None, None] * by_token(chunks.real)
    return chunks.cut(log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1))


def summed(log_decay: Tensor, chunks: Chunks) -> Tensor:
    """Returns inclusive sums of log decays from the start of the chunk or of the document.

    It is a product with the mask, not a running sum less that of the documents before. So nothing of these is in the
    result, not even a rounding error.
    """
    return chunks.same.unsqueeze(2).to(log_decay.dtype) @ log_decay


def remaining(decay: Tensor, chunks: Chunks) -> Tensor:
    """Returns what is left of each token's write at the end of the chunk."""
    return (decay[..., -1:, :] - decay).masked_fill(~by_token(chunks.tail), -torch.inf).exp()


def scores(q: Tensor, k: Tensor, decay: Tensor | None, chunks: Chunks) -> Tensor:
    """Returns scores ``[B, N, H, C, C]``: q_i k_j e^{G_i - G_j}, 0 where i does not see j."""
    same = chunks.same.unsqueeze(2)
    if decay is None:
        return (q @ k.mT).masked_fill(~same, 0)
    if decay.shape[-1] == 1:
        return (q @ k.mT) * pairwise(decay, same)
    return _scores_by_channel(q, k, decay, same)


def pairwise(decay: Tensor, same: Tensor) -> Tensor:
    """Returns e^{G_i - G_j} ``[B, N, H, C, C]`` of a decay by head ``[B, N, H, C, 1]``, 0 where i does not see j."""
    return _raised(decay.unsqueeze(-2) - decay.unsqueeze(-3), same).squeeze(-1)


def _raised(distance: Tensor, same: Tensor) -> Tensor:
    """Returns e^distance ``[..., C, C, K]``, 0 where i does not see j, and 1 for i = j by definition.

    What a token reads of itself has no part in the gradient of decays. It would only cancel to a rounding error there.
    """
    itself = torch.eye(same.shape[-1], dtype=torch.bool, device=same.device)
    return distance.masked_fill(~same.unsqueeze(-1), -torch.inf).masked_fill(itself.unsqueeze(-1), 0).exp()


def _scores_by_channel(q: Tensor, k: Tensor, decay: Tensor, same: Tensor) -> Tensor:
    """Returns scores of a decay by channel, computed for one sub-chunk of queries after another.

    Pairs inside a sub-chunk go one by one. Tokens before it go by a product, with decays taken from its border: the
    token before its first.
    """
    rows = []
    for start in range(0, q.shape[-2], SUBCHUNK):
        own = slice(start, min(start + SUBCHUNK, q.shape[-2]))
        queries, sums = q[..., own, :], decay[..., own, :]
        weight = _raised(sums.unsqueeze(-2) - sums.unsqueeze(-3), same[..., own, own])  # [B, N, H, c, c, K]
        near = (queries.unsqueeze(-2) * k[..., own, :].unsqueeze(-3) * weight).sum(-1)
        parts = [near, near.new_zeros(*near.shape[:-1], q.shape[-2] - own.stop)]
        if start:
            border = decay[..., start - 1 : start, :]
            sees = same[..., own, start - 1].unsqueeze(-1)  # of the border's document
            seen = same[..., start - 1, :start].unsqueeze(-1)
            to_border = (border - decay[..., :start, :]).masked_fill(~seen, -torch.inf).exp()
            since_border = (sums - border).masked_fill(~sees, -torch.inf).exp()
            parts.insert(0, (queries * since_border) @ (k[..., :start, :] * to_border).mT)
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, -2)
