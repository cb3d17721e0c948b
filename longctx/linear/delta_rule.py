"""Computes chunks of the gated delta rule: a token first removes what the state holds under its key, then writes.

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = q_t S_t

Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (2024). The chunk form is that of Yang et al., "Parallelizing
Linear Transformers with the Delta Rule over Sequence Length" (2024). With G as in ``diagonal`` and
D_ij = e^{G_i - G_j} where i sees j, what the chunk's tokens write in place of their values is

    U - W S_in,    (I + L) [W | U] = b [K e^G | V],    L = strictly lower part of b K K^T . D

so that, with K~ = K e^{G_C - G} and R = Q K^T . D,

    A = e^{G_C} I - K~^T W        B = K~^T U        O = (Q e^G - R W) S_in + R U
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.linear.chunks import Chunks
from longctx.linear.diagonal import by_token, cut_decay, pairwise, remaining, summed


@dataclass(frozen=True)
class DeltaWrites:
    """What the tokens of a chunk write: its ``transition`` and ``addition``, and what they were computed from.

    ``transition`` ``[B, N, H, K, K]``, ``addition`` ``[B, N, H, K, V]``. ``reading`` ``[B, N, H, C, K]``: Q e^G.
    ``scores``: R ``[B, N, H, C, C]``. ``erased``, ``values``: W and U.
    """

    transition: Tensor
    addition: Tensor
    reading: Tensor
    scores: Tensor
    erased: Tensor
    values: Tensor


def write(q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], chunks: Chunks) -> DeltaWrites:
    """Computes what each chunk writes to the state.

    q, k ``[B, T/SP, H, K]``, v ``[B, T/SP, H, V]``; ``gates``: log decay ``[B, T/SP, H]`` or ``[H]``, at most 0, and
    b ``[B, T/SP, H]``.
    """
    acc_dtype = accumulation_dtype(q.dtype)
    q, k, v = (chunks.cut(tensor.to(acc_dtype)) for tensor in (q, k, v))
    log_decay, beta = gates
    decay = summed(cut_decay(log_decay.to(acc_dtype), chunks), chunks)
    beta = chunks.cut(beta.to(acc_dtype).unsqueeze(-1))
    weight = pairwise(decay, chunks.same.unsqueeze(2))
    entered = decay.masked_fill(~by_token(chunks.head), -torch.inf).exp()
    lower = (beta * (k @ k.mT) * weight).tril(-1)
    # The solver takes the diagonal for ones.
    solved = torch.linalg.solve_triangular(
        lower, beta * torch.cat([k * entered, v], -1), upper=False, unitriangular=True
    )
    erased, values = solved.split([k.shape[-1], v.shape[-1]], -1)
    leaving = k * remaining(decay, chunks)
    last = decay[..., -1:, :].masked_fill(~chunks.keep[:, :, None, None, None], -torch.inf).exp()
    identity = torch.eye(k.shape[-1], dtype=acc_dtype, device=k.device)
    return DeltaWrites(
        transition=last * identity - leaving.mT @ erased,
        addition=leaving.mT @ values,
        reading=q * entered,
        scores=(q @ k.mT) * weight,
        erased=erased,
        values=values,
    )


def reads(written: DeltaWrites, chunks: Chunks) -> Tensor:
    """Returns E ``[B, N, H, C, K]`` of O = E S_in + ..., with S_in the state that enters the chunk."""
    return written.reading - written.scores @ written.erased


def intra(written: DeltaWrites, chunks: Chunks) -> Tensor:
    """Returns what tokens read of their own chunk, ``[B, N, H, C, V]``."""
    return written.scores @ written.values
