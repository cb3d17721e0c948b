"""Lends linear layers a core that remembers the sequence so far: a state, and the last tokens of short convolutions.

A prompt is computed by the layer's own strategy. The state after it is read from probes: tokens behind the prompt that
write nothing and whose queries are the unit vectors, so that what they read are the rows of the state. Keys, values and
gates of one layer's prompt are brought together for that, and each further token is one recurrent update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.comm import SUM, Group, all_reduce
from longctx.linear import LinearAttention, LinearCore
from longctx.sequence import Contiguous, Documents, Mask, make_plan, plan_of

_LOCAL = "lasp2"  # computes a whole sequence on one rank


class RememberingCore:
    """A ``LinearCore`` of one layer, for tokens that come in several passes.

    ``whole``: computes a prompt. Every rank of ``group`` keeps the whole state, which does not grow.
    """

    def __init__(self, whole: LinearCore, group: Group) -> None:
        self._whole = whole
        self._group = group
        self._new: int | None = None  # tokens of this pass; None for a prompt
        self._attended = self._filtered = 0  # calls of this pass
        self._states: list[Tensor] = []  # [B, H/TP, K, V], one for each time that the mixer attends
        self._tails: list[Tensor] = []  # [B, W - 1, H/TP, C], one for each convolution

    @property
    def group_name(self) -> str:
        """Names the group of the ranks that share the sequence."""
        return self._group.name

    def begin(self, new: int | None) -> None:
        """Starts a pass of so many new tokens, or of a prompt."""
        self._new, self._attended, self._filtered = new, 0, 0

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Tensor,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """Computes as ``LinearCore`` says; rows behind the new tokens are padding, and give 0."""
        number = self._attended
        self._attended += 1
        if log_decay is not None and log_decay.ndim == 1:
            log_decay = log_decay.expand(q.shape[:3])
        if self._new is None:
            out = self._whole.attend(q, k, v, plan, log_decay, beta)
            self._states.append(self._state_after(k, v, plan, log_decay, beta))
            return out
        wide, new = accumulation_dtype(q.dtype), self._new
        if number == len(self._states):
            self._states.append(q.new_zeros(len(q), *k.shape[2:], v.shape[-1], dtype=wide))
        state = self._states[number]
        read = []
        for token in range(new):
            key, value = k[:, token].to(wide), v[:, token].to(wide)
            if log_decay is not None:
                decay = log_decay[:, token].to(wide).exp()
                state = state * (decay if decay.ndim == 3 else decay[..., None])[..., None]
            if beta is not None:
                stored = torch.einsum("bhk,bhkv->bhv", key, state)
                value = beta[:, token, :, None].to(wide) * (value - stored)
            state = state + key[..., None] * value[..., None, :]
            read.append(torch.einsum("bhk,bhkv->bhv", q[:, token].to(wide), state))
        self._states[number] = state
        return F.pad(torch.stack(read, 1).to(v.dtype), (0, 0, 0, 0, 0, q.shape[1] - new))

    def convolve(self, xs: Sequence[Tensor], weights: Sequence[Tensor], plan: Tensor) -> list[Tensor]:
        """Convolves as ``LinearCore`` says; the tails of one call are those of the next pass's."""
        if self._new is None:
            out = self._whole.convolve(xs, weights, plan)
            sequence = plan_of(plan)
            for x, weight in zip(xs, weights, strict=True):
                kept = weight.shape[-1] - 1
                self._tails.append(self._gathered(x, plan, sequence.length - kept, sequence.length))
            return out
        return [self._convolved(x, weight) for x, weight in zip(xs, weights, strict=True)]

    def _convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        number, taps, new = self._filtered, weight.shape[-1], self._new
        assert new is not None, "a prompt is convolved by its strategy"
        self._filtered += 1
        if number == len(self._tails):
            self._tails.append(x.new_zeros(len(x), taps - 1, *x.shape[2:]))
        seen = torch.cat([self._tails[number], x[:, :new]], 1)
        self._tails[number] = seen[:, new:]
        wide = accumulation_dtype(x.dtype)
        out = torch.einsum("bthcw,hcw->bthc", seen.to(wide).unfold(1, taps, 1), weight.to(wide)).to(x.dtype)
        return F.pad(out, (0, 0, 0, 0, 0, x.shape[1] - new))

    def _state_after(self, k: Tensor, v: Tensor, plan: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> Tensor:
        """Returns the state ``[B, H/TP, K, V]`` after a prompt, in the accumulation dtype."""
        probes, length, wide = k.shape[-1], plan_of(plan).length, accumulation_dtype(k.dtype)

        def extended(x: Tensor) -> Tensor:
            x = self._gathered(x.to(wide), plan, 0, length)
            return torch.cat([x, x.new_zeros(len(x), probes, *x.shape[2:])], 1)

        keys, values = extended(k), extended(v)
        queries = torch.zeros_like(keys)
        queries[:, length:] = torch.eye(probes, dtype=wide, device=k.device)[:, None]
        gates = [None if gate is None else extended(gate) for gate in (log_decay, beta)]
        total = length + probes
        own = make_plan((Documents.single(total),) * len(k), Mask(), Contiguous(), total, 1)
        out = LinearAttention(_LOCAL).attend(queries, keys, values, own.handle, *gates)
        return out[:, length:].transpose(1, 2)

    def _gathered(self, x: Tensor, plan: Tensor, start: int, stop: int) -> Tensor:
        """Returns rows from ``start`` to ``stop`` of the whole sequence of x; 0 before its first."""
        positions = torch.from_numpy(plan_of(plan).positions(self._group.rank))
        mine = (positions >= start).nonzero()[:, 0]
        whole = x.new_zeros(len(x), stop - start, *x.shape[2:])
        whole[:, (positions[mine] - start).to(x.device)] = x[:, mine.to(x.device)]
        return all_reduce(self._group, whole, SUM)
