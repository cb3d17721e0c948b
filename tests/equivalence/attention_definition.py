"""Attention and its gradients written from the definition, with nothing of longctx: neither autograd nor tiles.

P = softmax(s q k^T over visible keys),  o = P v
dv = P^T do,  dP = do v^T,  dS = P * (dP - rowsum(do * o)),  dq = s dS k,  dk = s dS^T q
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tests.equivalence.attention_cases import Problem, inputs

QUERIES = 512  # at a time


def documents_of(lengths: tuple[int, ...], length: int) -> Tensor:
    """Number of each position's document, -1 for padding."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    return torch.cat([numbers, torch.full((length - sum(lengths),), -1)])


def sees(document: Tensor, causal: bool, window: int | None, first: int, last: int) -> Tensor:
    """Bool ``[last - first, S]``: which keys the queries ``[first, last)`` see."""
    query, key = torch.arange(first, last)[:, None], torch.arange(len(document))
    seen = (document[first:last, None] == document) & (document[first:last, None] != -1)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= (query - key).abs() < window
    return seen


def attention(
    tensors: dict[str, Tensor], packing: tuple[tuple[int, ...], ...], causal: bool, window: int | None
) -> dict[str, Tensor]:
    """out, dq, dk, dv of whole q, k, v, dout ``[B, S, H or Hkv, D]``."""
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    scale, group = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    out, dq, dk, dv = (torch.zeros_like(like) for like in (q, q, k, v))
    for row, lengths in enumerate(packing):
        document = documents_of(lengths, q.shape[1])
        for first in range(0, q.shape[1], QUERIES):
            last = min(first + QUERIES, q.shape[1])
            seen = sees(document, causal, window, first, last)
            keys = torch.nonzero(seen.any(0)).flatten()
            if not len(keys):
                continue
            low, high = int(keys[0]), int(keys[-1]) + 1  # nobody here sees a key outside
            seen = seen[:, low:high]
            for head in range(q.shape[2]):
                mine, its = (row, slice(first, last), head), (row, slice(low, high), head // group)
                scores = (scale * q[mine] @ k[its].T).masked_fill(~seen, -torch.inf)
                top = scores.amax(1, keepdim=True).clamp(min=-1e300)
                weights = torch.exp(scores - top)
                weights /= weights.sum(1, keepdim=True).clamp(min=1e-300)  # a blind query has no weights
                out[mine] = weights @ v[its]
                dv[its] += weights.T @ dout[mine]
                upstream = dout[mine] @ v[its].T - (dout[mine] * out[mine]).sum(1, keepdim=True)
                upstream *= weights
                dq[mine] = scale * upstream @ k[its]
                dk[its] += scale * upstream.T @ q[mine]
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


@lru_cache(maxsize=4)
def reference(problem: Problem) -> dict[str, Tensor]:
    """Of the problem's inputs, kept for the cases that share it."""
    mask = problem.mask
    return attention(inputs(problem), problem.packing, mask.causal, mask.window)
