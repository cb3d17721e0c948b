"""Dense reference attention: the definition, on one process, in any dtype.

It shares nothing with tiles, plans or kernels. Visibility is written out cell by cell from the documents and the mask,
so that a mistake there cannot hide here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.sequence import Documents, Mask


def visible(documents: Documents, mask: Mask, length: int) -> Tensor:
    """Returns which keys each query sees, bool ``[S, S]``."""
    document = torch.full((length,), -1)
    for number, (start, stop) in enumerate(
        zip(documents.cu_seqlens[:-1].tolist(), documents.cu_seqlens[1:].tolist(), strict=True)
    ):
        document[start:stop] = number
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (document[:, None] == document[None, :]) & (document[:, None] >= 0)
    if mask.causal:
        seen &= distance >= 0
    if mask.window is not None:
        seen &= distance.abs() < mask.window
    return seen


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Sequence[Documents], mask: Mask, scale: float | None = None
) -> Tensor:
    """Computes softmax(scale * q k^T) v over the visible cells; autograd differentiates it.

    q ``[B, S, H, D]``, k and v ``[B, S, Hkv, D]``. A query that sees nothing has output 0. It needs O(S^2) memory for
    one head and one batch row at a time.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    per_key_head = q.shape[2] // k.shape[2]
    rows = []
    for row, docs in enumerate(documents):
        seen = visible(docs, mask, q.shape[1])
        blind = ~seen.any(dim=1)
        heads = []
        for head in range(q.shape[2]):
            key_head = head // per_key_head
            scores = scale * (q[row, :, head] @ k[row, :, key_head].T)
            # A blind row sees everything and is zeroed after, so that no gradient meets inf - inf.
            scores = scores.masked_fill(~(seen | blind[:, None]), -torch.inf)
            out = torch.softmax(scores, dim=-1) @ v[row, :, key_head]
            heads.append(out.masked_fill(blind[:, None], 0.0))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows)
