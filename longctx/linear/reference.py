"""Computes linear attention token by token over whole sequences: the definition that all else is compared with.

It shares no code with the chunks and needs no plan. Sequences are ``[B, S, ...]``, one ``Documents`` a batch row; what
is past a row's documents reads and writes nothing, and its output is 0. Slow, for tests and the canary, in any dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.sequence import Documents


def decayed_sums(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, documents: Sequence[Documents]) -> Tensor:
    """Computes S_t = decay_t S_{t-1} + k_t v_t^T and o_t = q_t S_t.

    q, k ``[B, S, H, K]``, v ``[B, S, H, V]``, decay ``[B, S, H, 1 or K]``.
    """
    going_on, real = _tokens(documents, q)
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = decay[:, t].unsqueeze(-1) * state * going_on[:, t] + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * real[:, t])
    return torch.stack(out, 1)


def delta_sums(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, documents: Sequence[Documents]) -> Tensor:
    """Computes S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T and o_t = q_t S_t.

    decay (a) and beta (b): ``[B, S, H]``.
    """
    going_on, real = _tokens(documents, q)
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, None, None] * state * going_on[:, t]
        stored = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        correction = beta[:, t, :, None] * (v[:, t] - stored)
        state = state + k[:, t].unsqueeze(-1) * correction.unsqueeze(-2)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * real[:, t])
    return torch.stack(out, 1)


def convolved(x: Tensor, weight: Tensor, documents: Sequence[Documents]) -> Tensor:
    """Computes y_t = sum over w of weight[W-1-w] x_{t-w}, as far back as the document goes.

    x ``[B, S, H, C]``, weight ``[H, C, W]``.
    """
    going_on, real = _tokens(documents, x)
    taps, out = weight.shape[-1], []
    for t in range(x.shape[1]):
        total, same = torch.zeros_like(x[:, t]), torch.ones_like(going_on[:, t, :, :, 0])
        for back in range(min(taps, t + 1)):
            total = total + same * weight[..., taps - 1 - back] * x[:, t - back]
            same = same * going_on[:, t - back, :, :, 0]
        out.append(total * real[:, t])
    return torch.stack(out, 1)


def document_sums(q: Tensor, k: Tensor, v: Tensor, documents: Sequence[Documents]) -> Tensor:
    """Computes o_t = q_t (sum of k v^T over the document of t)."""
    rows = []
    for row, packing in enumerate(documents):
        parts = [
            q[row, start:stop].transpose(0, 1) @ torch.einsum("thk,thv->hkv", k[row, start:stop], v[row, start:stop])
            for start, stop in itertools.pairwise(packing.cu_seqlens.tolist())
        ]
        rest = v.new_zeros(v.shape[2], q.shape[1] - packing.length, v.shape[3])
        rows.append(torch.cat([*parts, rest], 1).transpose(0, 1))
    return torch.stack(rows)


class RecurrentCore:
    """A ``LinearCore`` of one process that holds whole sequences; it reads no plan.

    ``causal`` False: queries see all of their document, which only states without decay can do.
    """

    group_name = ""

    def __init__(self, documents: Sequence[Documents], causal: bool = True) -> None:
        self._documents = documents
        self._causal = causal

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Tensor,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        if not self._causal:
            assert log_decay is None and beta is None, "strategies refuse these"
            return document_sums(q, k, v, self._documents)
        decay = torch.ones_like(q[..., 0]) if log_decay is None else log_decay.exp()
        if beta is not None:
            return delta_sums(q, k, v, decay.expand(q.shape[:3]), beta, self._documents)
        if decay.ndim < 4:
            decay = decay.expand(q.shape[:3]).unsqueeze(-1)
        return decayed_sums(q, k, v, decay, self._documents)

    def convolve(self, xs: Sequence[Tensor], weights: Sequence[Tensor], plan: Tensor) -> list[Tensor]:
        return [convolved(x, weight, self._documents) for x, weight in zip(xs, weights, strict=True)]


def _tokens(documents: Sequence[Documents], like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two masks: 1 where a token goes on with its document, and 1 where it is of a document at all.

    They are ``[B, S, 1, 1, 1]`` and ``[B, S, 1, 1]``.
    """
    going_on = like.new_ones(like.shape[:2])
    real = like.new_zeros(like.shape[:2])
    for row, packing in enumerate(documents):
        going_on[row, torch.from_numpy(packing.cu_seqlens[:-1].copy())] = 0
        real[row, : packing.length] = 1
    return going_on[:, :, None, None, None], real[:, :, None, None]
