"""Generates text: a sequence-parallel strategy computes the prompt, tree decoding computes each further token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.errors import ConfigError, NumericsError
from longctx.evaluate.session import DecodingSession, SequenceSharding
from longctx.evaluate.stages import StagedModel
from longctx.model import Decoder


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    ``temperature`` 0 takes the likeliest; ``top_k``: only among so many likeliest ones. ``top_p``: of these, only the
    fewest likeliest that have so much of the probability together. ``seed``: of a generator that all ranks draw from
    alike. ``stop_ids``: tokens of which each ends a sequence.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature} must be at least 0 and finite; 0 takes the likeliest")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k} must be at least 1; leave it out for no limit")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} must be above 0 and at most 1; 1 keeps all tokens")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} must be at least 0 and below 2**63; nearest valid: 0")


GREEDY = Sampling()
UNSHARDED = SequenceSharding()


@dataclass(frozen=True)
class Generated:
    """Prompts with what was generated after them.

    ``tokens``: int64 ``[B, S + n]``; after a stop id a sequence repeats it. ``logits``: those that each new token was
    chosen from, ``[B, n, V]`` on the CPU, where they were asked for.
    """

    tokens: Tensor
    logits: Tensor | None = None


@torch.no_grad()
def generate(
    model: Decoder | StagedModel,
    tokens: Tensor,
    max_new_tokens: int,
    sharding: SequenceSharding = UNSHARDED,
    sampling: Sampling = GREEDY,
    keep_logits: bool = False,
    tell: Callable[[Tensor], None] | None = None,
) -> Generated:
    """Continues the prompts ``tokens``, int64 ``[B, S]``, which have one length and are whole on every rank.

    It ends after ``max_new_tokens``, or when every sequence has a stop id. All ranks return the same. ``tell``: is
    given each new token, int64 ``[B]``, as soon as all ranks agree on it.
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens {max_new_tokens} must be at least 0")
    generator = torch.Generator().manual_seed(sampling.seed)
    stops = torch.tensor(sampling.stop_ids, dtype=torch.int64)
    chosen: list[Tensor] = []
    kept_logits: list[Tensor] = []
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    with DecodingSession(model, sharding) as session:
        while len(chosen) < max_new_tokens and not bool(ended.all()):
            logits = session.decode(chosen[-1][:, None])[:, -1] if chosen else session.prefill(tokens)
            here = logits.cpu()
            following = sample_tokens(here, sampling, generator)
            if chosen:
                following = torch.where(ended, chosen[-1], following)
            # Logits of all ranks are the same but for the rounding of their devices, which may decide a near tie.
            agreed = session.agree(following.to(logits.device)).cpu()
            chosen.append(agreed)
            ended |= torch.isin(agreed, stops)
            if keep_logits:
                kept_logits.append(here)
            if tell is not None:
                tell(agreed)
    new = [token[:, None].to(tokens.device) for token in chosen]
    return Generated(torch.cat([tokens, *new], dim=1), torch.stack(kept_logits, dim=1) if kept_logits else None)


def sample_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Chooses one token, int64 ``[B]``, for each row of logits ``[B, V]``.

    A choice is where one uniform number falls among the probabilities in the order of their tokens. So rounding, which
    differs from mesh to mesh, moves it only where the number lies next to a border.
    """
    if not bool(torch.isfinite(logits).all()):
        raise NumericsError("logits are not finite; the weights or the arithmetic (train.dtype) are broken")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    odds = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if sampling.top_k is not None or sampling.top_p < 1:
        odds = odds * _likeliest(odds, sampling)
    cumulative = odds.cumsum(-1)
    drawn = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * cumulative[:, -1:]
    # A token of probability 0 is never the first whose sum exceeds the number.
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _likeliest(odds: Tensor, sampling: Sampling) -> Tensor:
    """Tells which tokens ``[B, V]`` may be chosen."""
    ordered, names = odds.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered = ordered.clone()
        ordered[:, sampling.top_k :] = 0
    share = ordered / ordered.sum(-1, keepdim=True)
    allowed = (share.cumsum(-1) - share < sampling.top_p) & (ordered > 0)
    return torch.zeros_like(allowed).scatter(-1, names, allowed)
