"""Builds the core of linear layers as the model sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from longctx.attention.runtime.borders import HANDLE, process_group_of, require_numbers, require_plain
from longctx.comm import group_of
from longctx.errors import ConfigError
from longctx.linear.operator import delta_attention, diagonal_attention
from longctx.linear.registry import get_linear
from longctx.linear.short_convolution import convolve
from longctx.rules import whole

CHUNK = 64


class LinearAttention:
    """Computes linear layers by a registered strategy, on the ranks of one sequence group: a ``LinearCore``.

    ``group``: the process group whose ranks share the sequence, or a device mesh of one axis; None for a sequence that
    is whole here. ``chunk``: tokens that are computed at once.
    """

    def __init__(self, strategy: str, group: dist.ProcessGroup | None = None, chunk: int = CHUNK) -> None:
        if whole("chunk", chunk) < 1:
            raise ConfigError(f"chunk={chunk} must be at least 1 token; {CHUNK} is the default")
        self._strategy = get_linear(strategy).name
        self.group_name = group_of(process_group_of(group)).name
        self._chunk = chunk

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Tensor,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """Maps q, k, v to the output as ``LinearCore`` says; ``plan``: the handle of the batch's plan."""
        return self.attend_with_states(q, k, v, plan, log_decay, beta)[0]

    def attend_with_states(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor, log_decay: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns beside the output the states ``[B, n, H/TP, K, V]`` that entered this rank's segments."""
        gates = [] if log_decay is None else [log_decay]
        named = (("q", q), ("k", k), ("v", v), (HANDLE, plan))
        require_plain((*named, *(one for one in (("log_decay", log_decay), ("beta", beta)) if one[1] is not None)))
        require_numbers({"q": q, "k": k, "v": v})
        _require_gates(q, log_decay, beta)
        _require_heads(q, k, v, log_decay, beta)
        context = (plan, self.group_name, self._strategy, self._chunk)
        found: tuple[Tensor, Tensor]
        if beta is None:
            found = diagonal_attention(q, k, v, gates, *context)
        else:
            found = delta_attention(q, k, v, [*gates, beta], *context)
        return found

    def convolve(self, xs: Sequence[Tensor], weights: Sequence[Tensor], plan: Tensor) -> list[Tensor]:
        """Convolves as ``LinearCore`` says; the gradients of ``weights`` are this rank's shares."""
        require_plain([("x", x) for x in xs] + [("weight", weight) for weight in weights] + [(HANDLE, plan)])
        return convolve(xs, weights, plan, self.group_name)


def _require_gates(q: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> None:
    """Refuses gates on another device or that are no floating numbers; they may be of a wider dtype than q."""
    for name, gate in (("log_decay", log_decay), ("beta", beta)):
        if gate is not None:
            require_numbers({name: gate})
            if gate.device != q.device:
                raise ConfigError(f"{name} is on {gate.device} and q on {q.device}; move it by .to(q.device)")


def _require_heads(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> None:
    tokens = q.shape[:3]
    if q.ndim != 4 or v.ndim != 4 or k.shape != q.shape or v.shape[:3] != tokens or not q.shape[2]:
        raise ConfigError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, T, H, K], [B, T, H, K] and "
            "[B, T, H, V]: linear layers have as many key/value heads as query heads"
        )
    decays: tuple[tuple[int, ...], ...] = ((tokens[2],), tuple(tokens), tuple(q.shape))
    if beta is not None:
        if log_decay is None or beta.shape != tokens:
            raise ConfigError(f"the delta rule wants log_decay and beta by token and head, {tuple(tokens)}")
        decays = decays[:2]
    if log_decay is not None and tuple(log_decay.shape) not in decays:
        shapes = " or ".join(map(str, decays))
        raise ConfigError(f"log_decay {tuple(log_decay.shape)} must be {shapes}")
