"""Lends linear layers a core that remembers the sequence so far: a state, and the last tokens of short convolutions.

A prompt is computed by the layer's own strategy. The rank that holds its last segment passes the state that entered
there through it again, and sends the state behind it to all. Tokens before the segment write that state: their keys are
the unit vectors, their values its rows. Tokens behind it read: they write nothing, and their queries are the unit
vectors. Each further token is one recurrent update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.comm import SUM, Group, all_reduce, broadcast
from longctx.linear import LinearAttention
from longctx.linear.segments import chain_of
from longctx.sequence import Contiguous, Documents, Mask, make_plan, plan_of

_LOCAL = "lasp2"  # computes a whole sequence on one rank


class RememberingCore:
    """A ``LinearCore`` of one layer, for tokens that come in several passes.

    ``whole``: computes a prompt. Every rank of ``group`` keeps the whole state, which does not grow.
    """

    def __init__(self, whole: LinearAttention, group: Group) -> None:
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
        self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None
    ) -> Tensor:
        """Computes as ``LinearCore`` says; rows behind the new tokens are padding, and give 0."""
        number = self._attended
        self._attended += 1
        by_token = log_decay.expand(q.shape[:3]) if log_decay is not None and log_decay.ndim == 1 else log_decay
        if self._new is None:
            out, entered = self._whole.attend_with_states(q, k, v, plan, log_decay, beta)
            self._states.append(self._state_after(entered, plan, (k, v), (by_token, beta)))
            return out
        wide, new = accumulation_dtype(q.dtype), self._new
        if number == len(self._states):
            self._states.append(q.new_zeros(len(q), *k.shape[2:], v.shape[-1], dtype=wide))
        state = self._states[number]
        read = []
        for token in range(new):
            key, value = k[:, token].to(wide), v[:, token].to(wide)
            if by_token is not None:
                decay = by_token[:, token].to(wide).exp()
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
            self._tails += [self._last(x, plan, weight.shape[-1] - 1) for x, weight in zip(xs, weights, strict=True)]
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

    def _state_after(
        self, entered: Tensor, plan: Tensor, pair: tuple[Tensor, Tensor], gates: Sequence[Tensor | None]
    ) -> Tensor:
        """Returns the state ``[B, H/TP, K, V]`` after a prompt of keys and values, log decays and strengths."""
        last = chain_of(plan_of(plan)).segments[-1]
        if last.rank == self._group.rank:
            rows = slice(last.first, last.first + last.tokens)
            k, v = (one[:, rows] for one in pair)
            state = _passed(entered[:, -1], k, v, [None if one is None else one[:, rows] for one in gates])
        else:
            state = entered.new_empty(len(entered), *entered.shape[2:])
        return broadcast(self._group, state.contiguous(), last.rank)

    def _last(self, x: Tensor, plan: Tensor, count: int) -> Tensor:
        """Returns so many last rows of the whole sequence of x; 0 before its first."""
        start = plan_of(plan).length - count
        positions = torch.from_numpy(plan_of(plan).positions(self._group.rank))
        mine = (positions >= start).nonzero()[:, 0]
        rows = x.new_zeros(len(x), count, *x.shape[2:])
        rows[:, (positions[mine] - start).to(x.device)] = x[:, mine.to(x.device)]
        return all_reduce(self._group, rows, SUM)


def _passed(state: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor | None]) -> Tensor:
    """Passes a state ``[B, H/TP, K, V]`` through tokens, all of one document and on this rank."""
    probes, total = k.shape[-1], k.shape[1] + 2 * k.shape[-1]
    unit = torch.eye(probes, dtype=state.dtype, device=k.device)[:, None].expand(len(k), probes, *k.shape[2:])

    def between(before: Tensor | float, x: Tensor) -> Tensor:
        whole = x.new_zeros(len(x), total, *x.shape[2:], dtype=state.dtype)
        whole[:, :probes], whole[:, probes:-probes] = before, x
        return whole

    keys, values = between(unit, k), between(state.transpose(1, 2), v)
    queries = torch.zeros_like(keys)
    queries[:, -probes:] = unit
    log_decay, beta = (None if one is None else between(own, one) for own, one in zip((0.0, 1.0), gates, strict=True))
    plan = make_plan((Documents.single(total),) * len(k), Mask(), Contiguous(), total, 1)
    out = LinearAttention(_LOCAL).attend(queries, keys, values, plan.handle, log_decay, beta)
    return out[:, -probes:].transpose(1, 2)
